"""Writing new tokens into the cache of latent attention with torch's fast norm and rotation, one after the other.

Shapes: T tokens, C latent, R = 2 · F rope key, W what comes in (C + R) and what a slot holds, N slots.
"""

from __future__ import annotations

from torch import Tensor

from ..rms_norm.analytic import rms_norm
from ..rotary.complex_product import rotary
from .reference import store


def latent_cache_write(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TF: Tensor, sin_TF: Tensor, cache_NW: Tensor, slots_T: Tensor
) -> None:
    """cache_NW[slots_T] = [rms_norm(latents), rotary(rope keys)]."""
    latent_TC, rope_TR = kv_TW.split([weight_C.shape[0], 2 * cos_TF.shape[1]], dim=-1)
    store(rms_norm(latent_TC, weight_C, eps), rotary(rope_TR, cos_TF, sin_TF), cache_NW, slots_T)
