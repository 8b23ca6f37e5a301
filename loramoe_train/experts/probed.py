"""A block that weighs its experts by what each of them, alone, would put out: one decision per sequence.

MoLE (arXiv 2404.13628), for a block F whose sites carry experts 1..E and an input x:

    o_i = F(x; expert i alone) - F(x; none)        what expert i adds to the block's output, residual left out
    w   = softmax(W [n(o_1 ... o_E)] / temperature)        on the mean of o over the prompt, n scales the whole to one
    y   = F(x; sum_i w_i expert i)

Every o_i depends on x, and so on the gates of earlier blocks: gradient passes through. It is a difference, of which a
base in bfloat16 leaves few digits; the mean over the prompt gives some back.

Legend: see `routing/prompts.py`; D width of the block, O of its output.
"""

from typing import Any

import torch
from torch import Tensor

from loramoe_train.experts.block import RoutedBlock
from loramoe_train.routing.fixed import fixed_routing
from loramoe_train.routing.prompts import CACHES, Prompts
from loramoe_train.routing.types import Routing


class ProbedBlock(RoutedBlock):
    """Runs its module once for nothing, once for every expert alone, then with the decision; with a filled cache once.

    The trial runs are given no cache, so they leave none behind.
    """

    def route(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Routing:
        x_BSD = args[0] if args else kwargs["hidden_states"]
        (rows, length), context = x_BSD.shape[:2], self.context
        fixed = fixed_routing(x_BSD.reshape(rows * length, -1), self.num_experts, context)
        if fixed is not None:
            return fixed
        if not (context.is_open or context.sequences.begin):
            kept_BE = context.sequences.kept(self.site, rows)
            return Routing(kept_BE.repeat_interleave(length, dim=0))
        prompts = context.prompts(x_BSD)
        decided = self.router(self._outputs(args, kwargs, x_BSD, prompts), context)
        if not context.is_open:
            context.sequences.keep(self.site, decided.weights_NE)
        return Routing(prompts.to_tokens(decided.weights_NE), prompts.to_tokens(decided.logits_NE))

    def _outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any], x_BSD: Tensor, prompts: Prompts) -> Tensor:
        """(Q, E, O) float32: the mean over each prompt of what each expert alone adds to the block's output."""
        kwargs = {**kwargs, **{name: None for name in CACHES if name in kwargs}}
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:  # of a cache with room for more than the prompt
            kwargs["attention_mask"] = mask[..., : x_BSD.shape[1]]
        none_E = torch.zeros(self.num_experts, dtype=torch.float32, device=x_BSD.device)
        base_ND, added = self._alone(args, kwargs, none_E), []
        for expert in range(self.num_experts):
            own_E = none_E.clone()
            own_E[expert] = 1.0
            added.append(prompts.mean(self._alone(args, kwargs, own_E) - base_ND))
        return torch.stack(added, dim=1)

    def _alone(self, args: tuple[Any, ...], kwargs: dict[str, Any], weights_E: Tensor) -> Tensor:
        """(N, O), at least float32: the block's output where all tokens have these weights."""
        x = args[0] if args else kwargs["hidden_states"]
        self.seat.put(Routing(weights_E.expand(x.shape[0] * x.shape[1], -1)))
        y = self.base(*args, **kwargs)
        self.seat.put(None)
        y = y[0] if isinstance(y, tuple) else y
        return y.reshape(-1, y.shape[-1]).to(torch.promote_types(y.dtype, torch.float32))
