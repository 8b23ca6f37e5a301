"""What the collator makes and the training step eats. Legend: B rows, S positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from loramoe_train.routing.types import Tokens

IGNORE = -100  # label of a position that carries no loss, as in transformers


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`, without waiting for what the device has to do before."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        # from ordinary memory a copy waits for the whole queue; torch keeps the pinned pages until it has been made
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class MixedBatch:
    """Examples of several tasks, padded (one example a row) or packed (several).

    `labels` are not shifted: `labels[b, s]` is `input_ids[b, s]` where that token is supervised, else -100.
    """

    input_ids: Tensor  # (B, S) int64
    labels: Tensor  # (B, S) int64
    valid: Tensor  # (B, S) bool: real tokens
    task_ids: Tensor  # (B, S) int64, -1 on padding
    domain_ids: Tensor  # (B, S) int64, -1 on padding
    position_ids: Tensor  # (B, S) int64, restarting at each example
    segment_ids: Tensor  # (B, S) int64, number of the example in its row, -1 on padding
    example_ids: tuple[str, ...]  # "task:split:row", in order of appearance
    packed: bool = False

    def tokens(self) -> Tokens:
        """The flat facts for the routing context."""
        segments_B1 = self.segment_ids.amax(dim=1, keepdim=True) + 1  # examples of each row: none where all is padding
        first_B1 = segments_B1.cumsum(dim=0) - segments_B1
        sample_BS = torch.where(self.segment_ids >= 0, self.segment_ids + first_B1, -1)
        return Tokens(
            valid_N=self.valid.reshape(-1),
            task_N=self.task_ids.reshape(-1),
            domain_N=self.domain_ids.reshape(-1),
            supervised_N=(self.labels != IGNORE).reshape(-1),
            sample_N=sample_BS.reshape(-1),
            num_samples=len(self.example_ids),
        )

    def num_supervised(self) -> int:
        """Tokens that carry loss. The first position of a row never does: nothing predicts it."""
        return int((self.labels[:, 1:] != IGNORE).sum())

    def to(self, device: torch.device) -> "MixedBatch":
        moved = {name: to_device(value, device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return MixedBatch(**{**vars(self), **moved})
