"""One optimizer step of a whole model: frozen base, PEFT's LoRA, loops over experts, and ours.

    python -m benchmarks.training_step [--quick] [--json FILE] [--model MODEL] [--dtype DTYPE]

A step is forward, the model's own loss over all tokens, backward and fused AdamW over what is trained; everything but
the adapters is the same for all candidates (see `candidates.py`). Random weights in the shape of the model; q, k, v and
o are adapted. Without --model and --dtype it goes through SmolLM2-135M's shape in both dtypes and a 2048-wide model in
bfloat16. `saved` is what the forward pass keeps for backward beyond the parameters; `ops` are the tensor operations of
forward and backward, `waits` those of them whose result sizes depend on data, for which a GPU has to be waited for.
"""

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.candidates import Candidate, build
from benchmarks.measure import DTYPE, CountOps, arguments, dtypes, finish, interleave, saved_mib, table, times
from benchmarks.shapes import Mixture, make_base, make_tokens
from benchmarks.twin import check

NAMES = ("base", "lora_active", "lora_total", "lora_all", "loop", "dense_loop", "ours", "ours_grouped")
QUICK = ("base", "lora_active", "loop", "ours")
SETTINGS = (("smollm2", "float32"), ("smollm2", "bfloat16"), ("wide", "bfloat16"))
MANY = 64  # experts of the wide comparison


def step(candidate: Candidate, optimizer: torch.optim.Optimizer | None, ids: torch.Tensor) -> None:
    with candidate.opened(ids):
        candidate.loss(ids).backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def measure(
    model: str,
    dtype: torch.dtype,
    names: Sequence[str],
    *,
    rounds: int,
    many: bool = True,
    device: str = "cpu",
    rows: int = 2,
    length: int = 256,
    mixture: Mixture | None = None,
) -> dict[str, Any]:
    """Figures of all candidates at one setting. With `many`, ours with 64 experts takes part too."""
    mixture = mixture or Mixture()
    base = make_base(model, dtype, device=device)
    candidates = [build(name, base, mixture) for name in names]
    errors = check(candidates, base, mixture, make_tokens(model, 2, 16, device=device))
    if many:
        wide = Mixture(MANY, mixture.rank, mixture.top_k, mixture.alpha)
        candidates.append(build("ours", base, wide))
        candidates[-1].name = f"ours_{MANY}"
    ids = make_tokens(model, rows, length, device=device)
    calls, costs = {}, {}
    for candidate in candidates:
        optimizer = torch.optim.AdamW(candidate.trained, lr=1e-4, fused=True) if candidate.trained else None
        costs[candidate.name] = count(candidate, ids)
        calls[candidate.name] = lambda c=candidate, o=optimizer: step(c, o, ids)
    found = times(interleave(calls, rounds=rounds, device=device), to=("base", "lora_active"))
    report = {name: {**found[name], **costs[name]} for name in found}
    sizes = {"model": model, "dtype": str(dtype).removeprefix("torch."), "tokens": rows * length, "device": device}
    return {**sizes, "mixture": vars(mixture), "twin_errors": errors, "candidates": report, "ratios": ratios(report)}


def count(candidate: Candidate, ids: torch.Tensor) -> dict[str, Any]:
    """What needs no clock: saved memory, operations, trained parameters."""
    with candidate.opened(ids):
        saved = saved_mib(lambda: candidate.loss(ids), candidate.model)
    with CountOps() as counted, candidate.opened(ids):
        candidate.loss(ids).backward()
    for parameter in candidate.trained:
        parameter.grad = None
    trained = sum(parameter.numel() for parameter in candidate.trained) / 1e6
    return {"saved_mib": saved, "ops": counted.ops, "waits": counted.data_dependent, "trained_millions": trained}


def ratios(report: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures that the project has targets for."""
    found = {}
    ours, lora = report.get("ours"), report.get("lora_active")
    if ours and lora:
        found["time_to_peft_lora"] = ours["to_lora_active"]
        found["saved_to_peft_lora"] = ours["saved_mib"] / lora["saved_mib"]
    if ours and "loop" in report:
        found["loop_time_to_ours"] = report["loop"]["to_lora_active"] / ours["to_lora_active"]
        found["loop_saved_to_ours"] = report["loop"]["saved_mib"] / ours["saved_mib"]
    many = report.get(f"ours_{MANY}")
    if ours and many:
        found[f"{MANY}_experts_time_to_8"] = many["to_base"] / ours["to_base"]
        found[f"{MANY}_experts_saved_to_8"] = many["saved_mib"] / ours["saved_mib"]
    return found


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments(
        "training_step",
        __doc__,
        given,
        dtype=DTYPE,
        model={"choices": ["smollm2", "wide", "llama3_8b", "tiny"]},
        tokens={"type": int, "default": 512, "help": "in two rows"},
    )
    measured = dtypes(options)
    settings = [(model, dtype) for model, dtype in SETTINGS if dtype in measured]
    if options.model or options.dtype:
        settings = [(options.model or "smollm2", measured[0])]
    rounds = options.rounds or (3 if options.quick else 9)
    results = []
    for model, dtype in settings:
        result = measure(
            model,
            getattr(torch, dtype),
            QUICK if options.quick else NAMES,
            rounds=rounds,
            device=options.device,
            length=options.tokens // 2,
        )
        results.append(result)
        table(f"{model}, {dtype}, {options.tokens} tokens, {options.device}", result["candidates"])
        table("ratios", {"": result["ratios"]})
    first = results[0]["ratios"]
    summary = {"time": first["time_to_peft_lora"], "saved_memory": first["saved_to_peft_lora"]}
    report = {"ratio_to_peft_lora": summary, "results": results}
    finish(report, options.json)
    return report


if __name__ == "__main__":
    main()
