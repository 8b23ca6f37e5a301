"""Groups `experts`, `router`, `aux_loss`: what is added to the model, who chooses, what regularises the choice."""

from typing import Literal

from pydantic import Field

from loramoe_train.schema.base import Part, Strict


class PlainConfig(Strict):
    """Ordinary LoRA beside a mixture, on sites of its own: one expert each, which no router weighs."""

    sites: str | list[str]
    rank: int = Field(gt=0)
    alpha: float = Field(gt=0)


class ExpertsConfig(Strict):
    """The expert layout and the shape of one expert."""

    layout: int | str | list[int] = 8  # one count, a code such as "2468", a list per layer, per_domain or per_task
    rank: int | list[int] = Field(default=8)  # one rank, or one per layer
    alpha: float = Field(default=16.0, gt=0)
    scale: Literal["alpha_over_rank", "alpha_over_sqrt_rank", "constant"] = "alpha_over_rank"  # constant: alpha itself
    dropout: float = Field(default=0.0, ge=0, lt=1)  # on the experts' input
    sites: str | list[str] = "all_linear"  # site kinds of the model group, module names, or all_linear
    form: Literal["auto", "concatenated", "grouped"] = "auto"  # how the experts are computed; the result is the same
    # what is weighed and added up: what an expert adds to a linear, or the outputs of whole feed-forward blocks
    mixing: Literal["delta", "output"] = "delta"
    plain: PlainConfig | None = None  # ordinary LoRA on other sites
    adapters: list[str] = Field(default_factory=list)  # PEFT LoRA folders that become the experts, in this order
    make: Part  # the bank that holds the experts of one site


class RouterConfig(Strict):
    """Who weighs the experts of a site for a token."""

    # where one decision is taken: nowhere, at every linear for itself, once for all sites of a block (`mlp`), or once
    # for the model, on what its base alone makes of the tokens (a second forward pass)
    scope: Literal["none", "site", "block", "model"] = "site"
    per_site: bool = False  # for scope model: a decision for every site, by a router with that many heads
    top_k: int | list[int] | None = None  # experts per token where selection is sparse; one number, or one per layer
    make: Part | None = None  # null: every expert has weight 1 (plain LoRA when there is one)


class AuxLossConfig(Strict):
    """One auxiliary loss: `weight` times an unweighted function of the routing records."""

    weight: float = 1.0
    scope: Literal["step", "micro_batch"] = "step"  # over which tokens its statistics are taken
    make: Part
