"""Auxiliary losses, exact under data parallelism and gradient accumulation.

A term's statistics (sums over valid tokens) are added up over its scope: the micro-batch with the same number on every
rank, or all micro-batches of the optimizer step. With everybody's statistics, each micro-batch then contributes its own
share, and the shares add up to the loss of the union. Data parallelism averages gradients over ranks, so the shares are
multiplied by the number of ranks; terms of scope `micro_batch` are averaged over the micro-batches of the step.

Legend: K length of all statistics together, J number of terms.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from loramoe_train.routing.types import Tokens
from loramoe_train.training.parts import AuxTerm, Records


class AuxTerms:
    """The terms of one stage, in a fixed order."""

    def __init__(self, terms: Sequence[AuxTerm], accelerator: Accelerator) -> None:
        self.terms = tuple(terms)
        self._accelerator = accelerator

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.terms)

    def needs_extra_pass(self, micro_batches: int) -> bool:
        """Whether a term needs statistics of micro-batches that have not been run yet."""
        return micro_batches > 1 and any(term.scope == "step" for term in self.terms)

    @torch.no_grad()
    def statistics(self, records: Records, tokens: Tokens) -> tuple[Tensor, ...]:
        """Each term's own sums over one micro-batch of this rank."""
        return tuple(term.loss.statistics(records, tokens).detach() for term in self.terms)

    def reduce(self, statistics: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The statistics of all ranks added up, in one all-reduce for all terms."""
        if self._accelerator.num_processes == 1 or not statistics:
            return tuple(statistics)
        lengths = [len(entry) for entry in statistics]
        summed_K = self._accelerator.reduce(torch.cat(list(statistics)), reduction="sum")
        return tuple(summed_K.split(lengths))

    def contributions(
        self,
        records: Records,
        tokens: Tokens,
        *,
        step_statistics: Sequence[Tensor] | None,
        micro_batches: int,
    ) -> tuple[Tensor | None, Tensor]:
        """What one micro-batch adds to the loss.

        Args:
            step_statistics: everybody's sums over the whole step; None where there is one micro-batch only.

        Returns:
            the weighted scalar to run backward on (None without terms), and (J,) float64 raw shares without gradient.
        """
        if not self.terms:
            return None, torch.zeros(0, dtype=torch.float64, device=tokens.valid_N.device)
        own = None
        if step_statistics is None or any(term.scope == "micro_batch" for term in self.terms):
            own = self.reduce(self.statistics(records, tokens))
        total: Tensor | None = None
        raw = []
        for index, term in enumerate(self.terms):
            whole_step = term.scope == "step" and step_statistics is not None
            sums = step_statistics[index] if whole_step else own[index]
            share = term.loss(records, tokens, sums)
            if term.scope == "micro_batch":
                share = share / micro_batches
            raw.append(share.detach().double())
            weighted = term.weight * share * self._accelerator.num_processes
            total = weighted if total is None else total + weighted
        return total, torch.stack(raw)
