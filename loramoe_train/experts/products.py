"""Narrow matrix products between a wide tensor in the base's dtype and stacked experts in theirs.

A CPU without bfloat16 instructions multiplies bfloat16 matrices 20 to 25 times slower than float32 ones, so there the
narrow products run in float32. The wide tensor is then converted a block of rows at a time and never copied as a whole.

Legend: N tokens, D width, R rank columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # of the wide tensor converted at a time: 4 MiB in float32


def narrow_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which narrow products beside a base of `dtype` run: its own, if the device multiplies it natively.

    The processor is asked once a call and says the same every time; nothing is measured, so runs can be repeated.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dtype
    return dtype if multiplies_natively(dtype, device) else torch.float32


def multiplies_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for matrices of a half-precision dtype."""
    if device.type == "cpu":
        return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)
    return True


def shrink(x_ND: Tensor, down_RD: Tensor) -> Tensor:
    """(N, R) = x down^T in the dtype of `down`."""
    if x_ND.dtype == down_RD.dtype:
        return x_ND @ down_RD.T
    if _small(x_ND):
        return x_ND.to(down_RD.dtype) @ down_RD.T
    out_NR = x_ND.new_empty(x_ND.shape[0], down_RD.shape[0], dtype=down_RD.dtype)
    for rows in _blocks(x_ND):
        torch.mm(x_ND[rows].to(down_RD.dtype), down_RD.T, out=out_NR[rows])
    return out_NR


def correlate(g_NR: Tensor, x_ND: Tensor) -> Tensor:
    """(R, D) = g^T x in the dtype of `g`: the gradient of a factor."""
    if x_ND.dtype == g_NR.dtype:
        return g_NR.T @ x_ND
    if _small(x_ND):
        return g_NR.T @ x_ND.to(g_NR.dtype)
    out_RD = g_NR.new_zeros(g_NR.shape[1], x_ND.shape[1])
    for rows in _blocks(x_ND):
        out_RD.addmm_(g_NR[rows].T, x_ND[rows].to(g_NR.dtype))
    return out_RD


def expand(g_NR: Tensor, up_RO: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, O) = g up in `dtype`."""
    if dtype == up_RO.dtype:
        return g_NR @ up_RO
    if g_NR.shape[0] * up_RO.shape[1] <= BLOCK_ELEMENTS:
        return (g_NR @ up_RO).to(dtype)
    out_NO = g_NR.new_empty(g_NR.shape[0], up_RO.shape[1], dtype=dtype)
    for rows in _blocks(out_NO):
        out_NO[rows] = g_NR[rows] @ up_RO
    return out_NO


def expand_onto(y_NO: Tensor, g_NR: Tensor, up_RO: Tensor) -> None:
    """y += g up, in place; the sum is rounded to the dtype of y once."""
    if y_NO.dtype == up_RO.dtype:
        y_NO.addmm_(g_NR, up_RO)
        return
    if _small(y_NO):
        y_NO.add_(g_NR @ up_RO)
        return
    for rows in _blocks(y_NO):
        y_NO[rows] += g_NR[rows] @ up_RO


def _small(wide_ND: Tensor) -> bool:
    """Whether one block holds all of it."""
    return wide_ND.numel() <= BLOCK_ELEMENTS


def _blocks(wide_ND: Tensor) -> Iterator[slice]:
    rows = max(BLOCK_ELEMENTS // max(wide_ND.shape[1], 1), 1)
    for start in range(0, wide_ND.shape[0], rows):
        yield slice(start, start + rows)
