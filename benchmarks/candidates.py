"""What a benchmark compares: the same base with nothing, PEFT's LoRA, the reference repositories' loops, or ours.

All mixtures get the same factors and routers (`factors_of`), so that their losses and gradients must agree; `twin.py`
checks that before anything is timed. Two loops stand for what published code does, written here in our own words:

| candidate | what it is |
|---|---|
| base | frozen, with gradient down to the embeddings: the floor |
| lora_active | PEFT LoRA of the rank that a token passes through (top-k times r): the limit for a mixture |
| lora_total | PEFT LoRA of the rank of all experts together |
| lora_all | PEFT with one adapter per expert, all active, summed without a router |
| loop | per expert: pick its tokens, down, up, weigh, add back (MoLA, MixLoRA, MoE-PEFT) |
| dense_loop | per expert: all tokens, down, up, weigh by a mask (LoRAMoE) |
| ours | this package, `experts.form=auto`; `ours_concatenated` and `ours_grouped` name the form |

Legend: N tokens, D in, O out, E experts, R rank of one expert.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import PROJECTIONS, Mixture, routed_config

UP_STD = 0.05  # experts in the middle of training: their zero start would hide errors


@dataclass(frozen=True)
class Factors:
    """A site's experts and router in float32: the common form that every mixture is filled from and checked in."""

    down_ERD: Tensor
    up_ERO: Tensor
    router_ED: Tensor

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.down_ERD, self.up_ERO, self.router_ED


@dataclass
class Candidate:
    """A model to be run, and where its trained parameters are in the common form."""

    name: str
    model: nn.Module
    trained: list[nn.Parameter]
    opened: Callable[[Tensor], AbstractContextManager] = lambda ids: nullcontext()
    gradients: Callable[[], dict[str, Factors]] | None = None  # by site; None: nothing to compare with
    facts: dict[str, Any] = field(default_factory=dict)

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids, use_cache=False).loss


def factors_of(site: str, linear: nn.Module, mixture: Mixture, device: Any = "cpu") -> Factors:
    """Seeded by the site's name, whatever the order of building."""
    seed = int.from_bytes(hashlib.sha256(site.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float) -> Tensor:
        return torch.empty(size).normal_(0.0, std, generator=generator).to(device)

    experts, rank, width = mixture.experts, mixture.rank, linear.in_features
    return Factors(
        normal(experts, rank, width, std=width**-0.5),
        normal(experts, rank, linear.out_features, std=UP_STD / mixture.rank**0.5),
        normal(experts, width, std=width**-0.5),
    )


def sites_of(model: nn.Module) -> dict[str, nn.Module]:
    """The adapted linear layers by name."""
    return {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS}


def build(name: str, base: nn.Module, mixture: Mixture, *overrides: str) -> Candidate:
    """One candidate; the frozen weights of `base` are shared, not copied."""
    own = copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})
    if name == "base":
        own.enable_input_require_grads()
        return Candidate(name, own, [])
    if name.startswith("lora_"):
        return _peft(name, own, mixture)
    if name in ("loop", "dense_loop"):
        return _loops(name, own, mixture)
    form = name.partition("_")[2] or "auto"
    return _ours(name, own, mixture, f"experts.form={form}", *overrides)


def _peft(name: str, model: nn.Module, mixture: Mixture) -> Candidate:
    from peft import LoraConfig, get_peft_model

    rank = {"lora_active": mixture.active_rank, "lora_total": mixture.total_rank, "lora_all": mixture.rank}[name]
    settings = dict(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(PROJECTIONS))
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings), adapter_name="0")
    if name == "lora_all":
        names = [str(expert) for expert in range(mixture.experts)]
        for other in names[1:]:
            made.add_adapter(other, LoraConfig(task_type="CAUSAL_LM", **settings))
        made.base_model.set_adapter(names)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    return Candidate(name, made, trained)


class LoopLinear(nn.Module):
    """A linear layer whose experts are modules, gone through one after the other, each on its own tokens."""

    def __init__(self, base: nn.Module, factors: Factors, mixture: Mixture, *, dense: bool) -> None:
        super().__init__()
        self.base, self.top_k, self.scale, self.dense = base, mixture.top_k, mixture.scale, dense
        device = base.weight.device

        def module(weight: Tensor) -> nn.Linear:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=device)
            with torch.no_grad():
                made.weight.copy_(weight)
            return made

        self.downs = nn.ModuleList(module(down) for down in factors.down_ERD)
        self.ups = nn.ModuleList(module(up.T) for up in factors.up_ERO)
        self.router = module(factors.router_ED)

    def forward(self, x: Tensor) -> Tensor:
        y, x_ND = self.base(x), x.reshape(-1, x.shape[-1]).to(self.router.weight.dtype)
        best_NK, chosen_NK = self.router(x_ND).topk(self.top_k, dim=-1)
        weight_NK = best_NK.softmax(dim=-1)
        out_NO = x_ND.new_zeros(x_ND.shape[0], y.shape[-1])
        for expert, (down, up) in enumerate(zip(self.downs, self.ups, strict=True)):
            if self.dense:
                weight_N = (weight_NK * (chosen_NK == expert)).sum(dim=-1)
                out_NO = out_NO + up(down(x_ND)) * (weight_N * self.scale)[:, None]
            else:
                token_P, place_P = torch.where(chosen_NK == expert)
                own_PO = up(down(x_ND[token_P])) * (weight_NK[token_P, place_P] * self.scale)[:, None]
                out_NO = out_NO.index_add(0, token_P, own_PO)
        return y + out_NO.to(y.dtype).view(y.shape)

    def gradients(self) -> Factors:
        downs = torch.stack([down.weight.grad for down in self.downs])
        ups = torch.stack([up.weight.grad.T for up in self.ups])
        return Factors(downs, ups, self.router.weight.grad)


def _loops(name: str, model: nn.Module, mixture: Mixture) -> Candidate:
    layers = {}
    for site, linear in sites_of(model).items():
        parent, _, attribute = site.rpartition(".")
        factors = factors_of(site, linear, mixture, linear.weight.device)
        layers[site] = LoopLinear(linear, factors, mixture, dense=name == "dense_loop")
        setattr(model.get_submodule(parent), attribute, layers[site])
    trained = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    return Candidate(
        name, model, trained, gradients=lambda: {site: layer.gradients() for site, layer in layers.items()}
    )


def _ours(name: str, model: nn.Module, mixture: Mixture, *overrides: str) -> Candidate:
    from loramoe_train.build import attach
    from loramoe_train.site_plan import plan_sites

    config = routed_config(mixture, *overrides)
    linears = sites_of(model)
    routed = attach(config, model, plan_sites(config, model, ["all"]), num_domains=1)
    for site, layer in routed.layers.items():
        factors = factors_of(site, linears[site], mixture, layer.bank.down.device)
        with torch.no_grad():
            layer.bank.down.copy_(factors.down_ERD.flatten(0, 1))
            layer.bank.up.copy_(factors.up_ERO.flatten(0, 1))
            layer.router.score.weight.copy_(factors.router_ED)

    def opened(ids: Tensor) -> AbstractContextManager:
        return routed.context.open(tokens_of(ids))

    def gradients() -> dict[str, Factors]:
        split = (mixture.experts, mixture.rank)
        return {
            site: Factors(
                layer.bank.down.grad.unflatten(0, split),
                layer.bank.up.grad.unflatten(0, split),
                layer.router.score.weight.grad,
            )
            for site, layer in routed.layers.items()
        }

    trained = list(_trained(routed.groups))
    facts = {"forms": sorted({_form(layer, mixture) for layer in routed.layers.values()})}
    return Candidate(name, model, trained, opened, gradients, facts)


def _form(layer: Any, mixture: Mixture) -> str:
    return layer.bank.form_for(mixture.top_k, 1024)


def _trained(groups: dict[str, dict[str, nn.Parameter]]) -> Iterator[nn.Parameter]:
    for members in groups.values():
        yield from (parameter.requires_grad_() for parameter in members.values())


def tokens_of(ids: Tensor) -> Any:
    """The facts about tokens of a batch without padding, all of one task."""
    from loramoe_train.routing.types import Tokens

    zeros = torch.zeros_like(ids).reshape(-1)
    true = torch.ones_like(zeros, dtype=torch.bool)
    return Tokens(true, zeros, zeros, true)
