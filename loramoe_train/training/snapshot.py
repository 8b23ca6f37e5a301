"""Copies in host memory: what a checkpoint holds, as it is now, while training goes on changing the originals."""

from collections.abc import Mapping

import torch
from torch import Tensor


@torch.no_grad()
def snapshot(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Contiguous copies on the CPU, complete when this returns; no two of them share memory.

    Args:
        files: file name -> tensor name -> tensor, wherever it lives. All of them are copied side by side: an
            accelerator is waited for once, after the last.
    """
    copies = {file: {name: _copied(tensor) for name, tensor in tensors.items()} for file, tensors in files.items()}
    for device in {tensor.device for tensors in files.values() for tensor in tensors.values()}:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return copies


def _copied(tensor: Tensor) -> Tensor:
    # contiguous before the copy: afterwards the host would rearrange bytes that are still on their way
    return tensor.detach().contiguous().to("cpu", non_blocking=True, copy=True)
