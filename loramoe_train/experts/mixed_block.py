"""A feed-forward block of the base model that is mixed as a whole: experts are copies of it, each with its own LoRA.

The frozen layers run once per token, whatever the number of experts; `mixing.py` has the equations. The banks are those
of the block's sites, where they are found by name as everywhere; here they are read, and the sites are not called.

Legend: N tokens, D width of the block's input and output, F inner width, R rank columns of all experts of a site.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from loramoe_train.experts.bank import ExpertBank
from loramoe_train.experts.block import RoutedBlock
from loramoe_train.experts.concatenated import Kept, add_experts, draw, gate, shrink_all
from loramoe_train.experts.feed_forward import FeedForward, try_out
from loramoe_train.experts.forms import Form, choose_form
from loramoe_train.experts.linear import ExpertLinear
from loramoe_train.experts.mixing import Mixing, mix
from loramoe_train.experts.pairs import Columns
from loramoe_train.experts.products import narrow_dtype
from loramoe_train.experts.stretched import Inner, mix_stretched
from loramoe_train.routing.context import RoutingContext
from loramoe_train.routing.seat import Owner, Seat
from loramoe_train.routing.types import Routing

BREAK_EVEN = {"cpu": 14.0}  # (E - 1) r; from one-off trials, which no benchmark repeats: the forms are close around it


class MixedBlock(RoutedBlock):
    """Decides on the block's input, and mixes the outputs of the chosen copies."""

    def __init__(
        self, base: nn.Module, *, shape: FeedForward, seat: Seat, num_experts: int, context: RoutingContext
    ) -> None:
        """`base` holds its wrapped sites; `feed_forward.py` checks banks and routers."""
        super().__init__(base, seat=seat, num_experts=num_experts, context=context)
        self.shape = shape

    @property
    def into(self) -> list[ExpertLinear]:
        """The sites that read the block's input."""
        return [getattr(self.base, name) for name in self.shape.into]

    @property
    def out(self) -> ExpertLinear:
        return getattr(self.base, self.shape.out)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.context.mode == "off":
            return self.base(*args, **kwargs)
        if self.training and not self.context.is_open:
            raise RuntimeError(f"{self.site}: training forward outside `with context.open(tokens):`")
        x = args[0] if args else kwargs["hidden_states"]
        x_ND, into, out = x.reshape(-1, x.shape[-1]), self.into, self.out
        gate_NF, up_NF = self.shape.halves([site.base(x_ND) for site in into])
        dtype = narrow_dtype(gate_NF.dtype, x.device)
        # frozen experts, and evaluation, drop nothing; the order of drawing is the same in every pass
        dropout = max([site.bank.active_dropout for site in (*into, out)]) if self.training else 0.0
        hidden, routing = self._narrow(x_ND, into, draw(x_ND, dropout) if dropout > 0.0 else None, dtype)
        self.record(routing)
        weights, experts_NK = _few(routing)
        how = self._how(weights, experts_NK, dtype)
        ups = self.shape.halves([site.bank.up for site in into])
        hidden = (hidden[0], None if up_NF is None else hidden[-1])
        kept = draw(gate_NF, dropout) if dropout > 0.0 else None
        if out.bank.mixes_outputs:
            y_ND = self._stretched(how, (gate_NF, up_NF), hidden, ups, weights, experts_NK, kept)
        else:
            factors = (*ups, out.bank.down)
            mixed_NF, low_NR = mix(how, gate_NF, up_NF, hidden, factors, weights, experts_NK, kept)
            bank = out.bank
            y_ND = add_experts(out.base(mixed_NF), low_NR, None, bank.up, bank.scale_E, bank.expert_R)
        return y_ND.view(*x.shape[:-1], y_ND.shape[-1])

    def _stretched(
        self,
        how: Mixing,
        inner: tuple[Tensor, Tensor | None],
        hidden: tuple[Tensor, Tensor | None],
        ups: tuple[Tensor, Tensor | None],
        weights: Tensor,
        experts_NK: Tensor | None,
        kept: Kept | None,
    ) -> Tensor:
        """(N, D): the mixture where banks stretch the rows of the adapted weights."""
        into, out, halves = self.into, self.out, self.shape.halves
        stretches = halves([site.bank.stretch() for site in into])
        biases = halves([_bias(site) for site in into]) if _bias(into[0]) is not None else (None, None)
        gate, up = [
            None if base_NF is None else Inner(base_NF, *facts)
            for base_NF, *facts in zip(inner, biases, hidden, ups, stretches, (how.gate, how.up), strict=True)
        ]
        bias_D, bank = _bias(out), out.bank

        def linear(a_TF: Tensor) -> Tensor:
            z_TD = out.base(a_TF)
            return z_TD if bias_D is None else z_TD - bias_D

        stretch_ED = bank.stretch()
        y_ND, low_NR = mix_stretched(how, gate, up, linear, stretch_ED, bank.down, weights, experts_NK, kept)
        stacked = (bank.num_experts, bank.ranks[0])
        up_RD = (bank.up.unflatten(0, stacked) * stretch_ED.unsqueeze(1)).flatten(0, 1)
        y_ND = add_experts(y_ND, low_NR, None, up_RD, bank.scale_E, None)
        return y_ND if bias_D is None else y_ND + bias_D

    def _narrow(
        self, x_ND: Tensor, into: list[ExpertLinear], kept: Kept | None, dtype: torch.dtype
    ) -> tuple[list[Tensor], Routing]:
        """(scaled rank columns (N, R) of each site that reads x, the decision): one product, if the router allows."""
        score = getattr(self.router, "linear_score", None) if self.context.mode == "learned" else None
        downs, banks = [site.bank.down for site in into], [site.bank for site in into]
        hidden_N, logits_NE = shrink_all(x_ND, downs, [] if score is None else [score[0]], kept, dtype)
        if score is None:
            routing = self.decide(x_ND)
        else:
            routing = self.router.decide(logits_NE if score[1] is None else logits_NE + score[1])
        parts = hidden_N.split([len(down) for down in downs], dim=1)
        scaled = [gate(part, None, bank.scale_E, bank.expert_R) for part, bank in zip(parts, banks, strict=True)]
        return scaled, routing

    def _how(self, weights: Tensor, experts_NK: Tensor | None, dtype: torch.dtype) -> Mixing:
        into, out = self.into, self.out
        banks = (into[0].bank, into[-1].bank, out.bank)
        columns = [Columns(bank.ranks, bank.expert_R) for bank in banks]
        return Mixing(
            getattr(self.base, self.shape.activation), *columns, form=_form(banks, weights, experts_NK), dtype=dtype
        )


def _bias(site: ExpertLinear) -> Tensor | None:
    return getattr(site.base, "bias", None)


def _few(routing: Routing) -> tuple[Tensor, Tensor | None]:
    """(weights (N, K), experts (N, K)) where a token has only some of the experts; else (weights (N, E), None)."""
    chosen = routing.chosen
    if chosen is None or chosen.experts_NK.shape[1] == routing.weights_NE.shape[1]:
        return routing.weights_NE, None
    return chosen.weights_NK, chosen.experts_NK


def _form(banks: tuple[ExpertBank, ...], weights: Tensor, experts_NK: Tensor | None) -> Form:
    """`grouped` where all three sites can be computed so, and the rule says that it is worth it."""
    if torch.compiler.is_compiling() or experts_NK is None:
        return "concatenated"
    device = weights.device
    forms = {
        # each choice of a token is a product of its own, over one expert's columns or over those of all
        choose_form(bank.form, ranks=bank.ranks, most=1, tokens=len(weights), device=device, break_even=BREAK_EVEN)
        for bank in banks
    }
    return "concatenated" if "concatenated" in forms else "grouped"


def try_blocks(blocks: Iterable[Owner]) -> None:
    """Whether the blocks that are to be mixed compute what they are taken for: one of every kind, experts off.

    Raises ConfigError where one does more; see `feed_forward.try_out`. Needs the weights.
    """
    tried = set()
    for block in blocks:
        kind = (type(block.base), block.shape) if isinstance(block, MixedBlock) else None
        if kind is not None and kind not in tried:
            tried.add(kind)
            with block.context.override("off"):
                try_out(block.site, block.base, block.shape)
