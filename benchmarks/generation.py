"""Greedy decoding with the KV cache: new tokens per second of the base, PEFT's LoRA, a loop over experts, and ours.

    python -m benchmarks.generation [--quick] [--json FILE] [--dtype DTYPE]

`generate` of transformers on SmolLM2-135M's shape with random weights, batches of 1 and 8, a prompt of 64 tokens. Every
mixture's logits are checked against the float64 twin's, and its cached decoding against the same forward without a
cache, before anything is timed. `folded` is ours with one expert folded into a plain LoRA of that expert's rank.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.candidates import Candidate, build, factors_of, sites_of
from benchmarks.measure import DTYPE, arguments, dtypes, finish, interleave, table, times
from benchmarks.shapes import Mixture, make_base, make_tokens
from benchmarks.twin import TwinLinear

NAMES = ("base", "lora_active", "lora_total", "lora_all", "loop", "dense_loop", "ours", "ours_64", "folded")
QUICK = ("base", "lora_active", "loop", "ours")
PROMPT = 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # relative, of all logits together


def make(name: str, base: torch.nn.Module, mixture: Mixture) -> Candidate:
    if name == "folded":
        made = build("lora_active", base, Mixture(1, mixture.rank, 1, mixture.alpha))
        made.name = name
    else:
        experts = 64 if name.endswith("_64") else mixture.experts
        made = build(name.removesuffix("_64"), base, Mixture(experts, mixture.rank, mixture.top_k, mixture.alpha))
        made.name = name
    made.model.eval()
    return made


def generate(candidate: Candidate, ids: Tensor, new: int) -> Tensor:
    """(B, PROMPT + new) ids; exactly `new` tokens."""
    with torch.no_grad():
        return candidate.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            use_cache=True,
        )


@torch.no_grad()
def check(candidate: Candidate, base: torch.nn.Module, mixture: Mixture, ids: Tensor) -> dict[str, float]:
    """Relative errors of the logits against the twin, and of cached against uncached ones. SystemExit above both."""
    model, allowed = candidate.model, TOLERANCE[next(base.parameters()).dtype]
    logits = model(input_ids=ids, use_cache=False).logits.double().cpu()
    cache, last = None, []
    for position in range(ids.shape[1]):
        out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        last.append(out.logits[:, -1].double().cpu())
    errors = {"cached": _error(torch.stack(last, dim=1), logits)}
    if candidate.gradients is not None:
        twin = copy.deepcopy(base).cpu().double()
        for site, linear in sites_of(twin).items():
            parent, _, attribute = site.rpartition(".")
            made = TwinLinear(linear, factors_of(site, linear, mixture), mixture)
            setattr(twin.get_submodule(parent), attribute, made)
        errors["twin"] = _error(logits, twin(input_ids=ids.cpu(), use_cache=False).logits)
    if not max(errors.values()) <= allowed:
        raise SystemExit(f"{candidate.name} does not compute what it should, so it is not timed: {errors}")
    return errors


def _error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments(
        "generation",
        __doc__,
        given,
        dtype=DTYPE,
        model={"choices": ["smollm2", "wide", "llama3_8b", "tiny"], "default": "smollm2"},
        new={"type": int, "help": "tokens to generate"},
    )
    name = dtypes(options)[-1]
    mixture, dtype = Mixture(), getattr(torch, name)
    new, rounds = options.new or (24 if options.quick else 64), options.rounds or (5 if options.quick else 11)
    base = make_base(options.model, dtype, device=options.device)
    candidates = [make(name, base, mixture) for name in (QUICK if options.quick else NAMES)]
    few = make_tokens(options.model, 2, 12, device=options.device)
    errors = {
        candidate.name: check(candidate, base, Mixture(experts=64) if candidate.name.endswith("_64") else mixture, few)
        for candidate in candidates
        if candidate.name != "base"
    }
    report: dict[str, Any] = {"model": options.model, "dtype": name, "new": new, "errors": errors}
    for rows in (1, 8):
        ids = make_tokens(options.model, rows, PROMPT, device=options.device)
        calls = {candidate.name: (lambda c=candidate, i=ids: generate(c, i, new)) for candidate in candidates}
        found = times(interleave(calls, rounds=rounds, device=options.device), to=("base", "lora_active"))
        for row in found.values():
            row["tokens_per_s"] = rows * new / row["seconds"]
        report[f"batch_{rows}"] = found
        table(f"{options.model}, {name}, batch {rows}, {PROMPT} + {new} tokens", found)
    finish(report, options.json)
    return report


if __name__ == "__main__":
    main()
