"""The attention mask of a packed batch. Legend: B rows, S positions (queries), K = S positions (keys).

Only a float, additive, 4-D mask keeps packed examples apart in every attention model and implementation of transformers
5.23 that was tried: restarted position ids alone are ignored as soon as a cache or any 2-D mask is there, and eager
attention takes a boolean 4-D mask for numbers, both without a word. State-space models cannot be kept apart at all.
"""

import torch
from torch import Tensor


def block_causal_mask(segment_ids_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, S, S) in `dtype`: 0 where the query may look, the lowest number where it may not.

    A token sees the tokens of its own segment up to itself; padding (segment -1) sees itself, for a row of nothing but
    lowest numbers would become an average over everything, or NaN.
    """
    length = segment_ids_BS.shape[1]
    index_S = torch.arange(length, device=segment_ids_BS.device)
    causal_SK = index_S[:, None] >= index_S[None, :]
    same_BSK = segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :]
    real_B1K = segment_ids_BS[:, None, :] >= 0
    itself_SK = index_S[:, None] == index_S[None, :]
    allowed_BSK = (same_BSK & causal_SK & real_B1K) | itself_SK
    mask_BSK = torch.full(allowed_BSK.shape, torch.finfo(dtype).min, dtype=dtype, device=segment_ids_BS.device)
    return mask_BSK.masked_fill_(allowed_BSK, 0.0).unsqueeze(1)
