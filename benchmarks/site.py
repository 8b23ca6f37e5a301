"""One adapted linear layer, forward and backward: every way to compute it, over widths, dtypes and numbers of experts.

    python -m benchmarks.site [--quick] [--json FILE]

The frozen layer (d -> d) alone is 1.0. `lora` is PEFT's LoRA of the rank that a token passes through; the loops stand
for the reference repositories (see `candidates.py`). Every mixture is checked against a float64 twin in output and all
gradients before it is timed. `saved` is in units of the layer's input, `ops` are the tensor operations of forward and
backward: what a GPU has to be told. The last table tells where the two forms cross:
(E - k) r / k against the ratio of their times; `experts/forms.py` holds the constant that follows.
"""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.candidates import Factors, LoopLinear, factors_of, tokens_of
from benchmarks.measure import DTYPE, MIB, CountOps, arguments, dtypes, finish, interleave, saved_mib, table, times
from benchmarks.shapes import Mixture
from benchmarks.twin import TwinLinear
from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.routers.router import Policy, Router
from loramoe_train.routers.scores import LinearScore
from loramoe_train.routers.select import TopK
from loramoe_train.routing.context import RoutingContext

FORMS = ("concatenated", "grouped")
MIXTURES = ((8, 8), (8, 16), (16, 8), (32, 8), (64, 8), (8, 64))  # experts, rank
FEW_MIXTURES = ((8, 8), (64, 8))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # relative, of output and gradients
MOST_EXPERTS_OF_A_DENSE_LOOP = 16  # beyond, it takes minutes


def ours(base: nn.Module, factors: Factors, mixture: Mixture, form: str) -> ExpertLinear:
    experts, width = factors.router_ED.shape
    bank = ExpertBank(
        width,
        factors.up_ERO.shape[2],
        ranks=(mixture.rank,) * experts,
        scales=(mixture.scale,) * experts,
        form=form,  # type: ignore[arg-type]
        device=base.weight.device,
    )
    policy = Policy(TopK(mixture.top_k, experts), "renormalised")
    score = LinearScore(width, experts, device=base.weight.device)
    router = Router(score=score, train=policy, evaluate=policy)
    layer = ExpertLinear(base, bank, router, site="site", context=RoutingContext())
    with torch.no_grad():
        bank.down.copy_(factors.down_ERD.flatten(0, 1))
        bank.up.copy_(factors.up_ERO.flatten(0, 1))
        score.weight.copy_(factors.router_ED)
    return layer


class Site:
    """All candidates beside one frozen layer."""

    def __init__(self, width: int, dtype: torch.dtype, mixture: Mixture, tokens: int, device: str) -> None:
        self.mixture, self.dtype = mixture, dtype
        torch.manual_seed(0)
        self.base = nn.Linear(width, width, bias=False, device=device, dtype=dtype).requires_grad_(False)
        self.factors = factors_of(f"{width}", self.base, mixture, device)
        self.x = torch.randn(tokens, width, device=device).to(dtype).requires_grad_()
        self.probe = torch.randn(tokens, width, device=device).to(dtype)

    def candidates(self, names: Sequence[str]) -> dict[str, nn.Module]:
        return {name: self._make(name) for name in names}

    def _make(self, name: str) -> nn.Module:
        if name == "base":
            return self.base
        if name == "lora":
            from peft.tuners.lora import Linear
            from peft.tuners.lora.config import LoraConfig

            rank = self.mixture.active_rank
            config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False)
            made = Linear(self.base, "default", config, r=rank, lora_alpha=2 * rank, init_lora_weights=False)
            for parameter in (made.lora_A["default"].weight, made.lora_B["default"].weight):
                parameter.data = parameter.data.to(self.x.device, torch.float32)
            return made
        if name in ("loop", "dense_loop"):
            return LoopLinear(self.base, self.factors, self.mixture, dense=name == "dense_loop")
        return ours(self.base, self.factors, self.mixture, name)

    def run(self, layer: nn.Module) -> Tensor:
        if not isinstance(layer, ExpertLinear):
            return layer(self.x)
        with layer.context.open(tokens_of(self.x[:, 0].long())):
            return layer(self.x)

    def step(self, layer: nn.Module) -> None:
        for parameter in (self.x, *layer.parameters()):
            parameter.grad = None
        self.run(layer).backward(self.probe)

    def check(self, layers: dict[str, nn.Module]) -> dict[str, float]:
        """The worst relative error of a mixture's output and gradients. Raises SystemExit above the tolerance."""
        twin = TwinLinear(_double(self.base), Factors(*(p.cpu() for p in self.factors.parts())), self.mixture)
        x = self.x.detach().cpu().double().requires_grad_()
        y = twin(x)
        y.backward(self.probe.cpu().double())
        wanted = [y, x.grad, *(part.grad for part in twin.factors)]
        errors = {}
        for name, layer in layers.items():
            if name in ("base", "lora"):
                continue
            self.step(layer)
            found = [self.run(layer), self.x.grad, *_gradients(layer, self.mixture).parts()]
            pairs = zip(found, wanted, strict=True)
            errors[name] = max(((a.detach().double().cpu() - b).norm() / b.norm()).item() for a, b in pairs)
            if not errors[name] <= TOLERANCE[self.dtype]:
                raise SystemExit(f"{name} does not compute what the twin computes: relative error {errors[name]:.1e}")
        return errors


def _double(linear: nn.Module) -> nn.Module:
    made = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.float64).requires_grad_(False)
    made.weight.copy_(linear.weight)
    return made


def _gradients(layer: Any, mixture: Mixture) -> Factors:
    if isinstance(layer, LoopLinear):
        return layer.gradients()
    split = (mixture.experts, mixture.rank)
    down, up = layer.bank.down.grad.unflatten(0, split), layer.bank.up.grad.unflatten(0, split)
    return Factors(down, up, layer.router.score.weight.grad)


def measure(
    width: int, dtype: torch.dtype, mixture: Mixture, *, rounds: int, tokens: int, device: str, names: Sequence[str]
) -> dict[str, Any]:
    site = Site(width, dtype, mixture, tokens, device)
    layers = site.candidates(names)
    errors = site.check(layers)
    calls: dict[str, Callable[[], None]] = {name: (lambda m=module: site.step(m)) for name, module in layers.items()}
    found = times(interleave(calls, rounds=rounds, warmup=2, device=device), to=("base", "lora"))
    unit = site.x.numel() * site.x.element_size() / MIB
    for name, layer in layers.items():
        found[name]["saved"] = saved_mib(lambda m=layer: site.run(m), layer) / unit
        with CountOps() as counted:
            site.step(layer)
        found[name]["ops"] = counted.ops
    sizes = {"width": width, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
    return {**sizes, "mixture": vars(mixture), "twin_errors": errors, "candidates": found}


def settings(options: Namespace) -> Iterator[tuple[int, torch.dtype, Mixture]]:
    widths = (576, 2048) if options.device == "cpu" else (576, 2048, 4096)
    for width, dtype in itertools.product(widths, [getattr(torch, name) for name in dtypes(options)]):
        for experts, rank in (
            ((8, 8), (64, 8)) if options.quick else ((8, 8), (8, 16), (16, 8), (32, 8), (64, 8), (8, 64))
        ):
            yield width, dtype, Mixture(experts, rank, 2, 2.0 * rank)


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Where the forms cross, and what 64 experts cost against 8 with the better form for each."""
    crossing, best = {}, {}
    for result in results:
        mixture, key = result["mixture"], (result["width"], result["dtype"])
        wasted = (mixture["experts"] - mixture["top_k"]) * mixture["rank"] / mixture["top_k"]
        forms = {form: result["candidates"][form] for form in FORMS}
        name = f"{key[0]} {key[1]} E={mixture['experts']} r={mixture['rank']}"
        ratio = forms["concatenated"]["to_base"] / forms["grouped"]["to_base"]
        crossing[name] = {"(E-k)r/k": wasted, "concatenated/grouped": ratio}
        if mixture["rank"] == 8:
            fastest = min(forms.values(), key=lambda form: form["to_base"])
            best[(*key, mixture["experts"])] = (fastest["to_base"], fastest["saved"])
    pairs = [(k[:2], best[k], best[(*k[:2], 8)]) for k in best if k[2] == 64 and (*k[:2], 8) in best]
    many = {f"{w} {d}": {"time": a[0] / b[0], "saved": (1 + a[1]) / (1 + b[1])} for (w, d), a, b in pairs}
    return {"crossing": crossing, "64_experts_to_8": many}


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    options = arguments("site", __doc__, given, dtype=DTYPE, tokens={"type": int, "default": 1024})
    rounds = options.rounds or (15 if options.quick else 31)
    results = []
    for width, dtype, mixture in settings(options):
        names = ["base", "lora", "loop", "dense_loop", *FORMS]
        if mixture.experts > MOST_EXPERTS_OF_A_DENSE_LOOP:
            names.remove("dense_loop")
        result = measure(
            width, dtype, mixture, rounds=rounds, tokens=options.tokens, device=options.device, names=names
        )
        results.append(result)
        title = f"{width} {result['dtype']}, {mixture.experts} experts of rank {mixture.rank}, top-{mixture.top_k}"
        table(title, result["candidates"])
    report = {"results": results, **summarise(results)}
    table("where the forms cross", report["crossing"])
    table("64 experts against 8, the better form each", report["64_experts_to_8"])
    finish(report, options.json)
    return report


if __name__ == "__main__":
    main()
