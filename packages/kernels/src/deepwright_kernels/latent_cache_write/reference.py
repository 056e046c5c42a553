"""Writing new tokens into the cache of latent attention, in plain torch (DeepSeek-V2, eq. 9 and 15).

The latent is normed, the rope key, which all heads share, is rotated and not normed. Both are rounded to the dtype they
came in, as if norm and rotation were operators of their own, and then stored as the cache stores: in its own dtype, or
packed as FP8 latents.

Shapes: T tokens, C latent, R = 2 · F rope key, W what comes in (C + R) and what a slot holds, N slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..mla_paged_decode.reference import pack_fp8_latents
from ..rms_norm.reference import rms_norm
from ..rotary.reference import rotary


def store(latent_TC: Tensor, rope_TR: Tensor, cache_NW: Tensor, slots_T: Tensor) -> None:
    """cache_NW[slots_T] = the tokens as the cache holds them."""
    if cache_NW.dtype == torch.uint8:
        rows_TW = pack_fp8_latents(latent_TC, rope_TR)
    else:
        rows_TW = torch.cat((latent_TC, rope_TR), dim=-1).to(cache_NW.dtype)
    cache_NW.index_copy_(0, slots_T.long(), rows_TW)


def latent_cache_write(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TF: Tensor, sin_TF: Tensor, cache_NW: Tensor, slots_T: Tensor
) -> None:
    """cache_NW[slots_T] = [rms_norm(latents), rotary(rope keys)]."""
    latent_TC, rope_TR = kv_TW.split([weight_C.shape[0], 2 * cos_TF.shape[1]], dim=-1)
    store(rms_norm(latent_TC, weight_C, eps), rotary(rope_TR, cos_TF, sin_TF), cache_NW, slots_T)
