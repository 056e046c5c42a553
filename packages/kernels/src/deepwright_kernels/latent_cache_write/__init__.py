"""Write new tokens into the paged cache of latent attention: norm, rotation, packing and placing at once. Inference
only."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, INTEGERS, require, require_device, require_dtype, require_shape
from ..mla_paged_decode.reference import SCALED_LATENTS, fp8_row_bytes

NAME = "latent_cache_write"
dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:latent_cache_write",
        "triton": f"{__name__}.triton:latent_cache_write",
        "torch": f"{__name__}.separate_passes:latent_cache_write",
    },
    elsewhere=("torch", "reference"),
)


def latent_cache_write(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TF: Tensor, sin_TF: Tensor, cache_NW: Tensor, slots_T: Tensor
) -> None:
    """cache_NW[slots_T] = [rms_norm(latents), rotary(rope keys)] (DeepSeek-V2, eq. 9 and 15), in place.

    kv_TW [T, C + R], what the down-projection gives: latents, then rope keys; weight_C [C] of the latents' norm; cos_TF
    and sin_TF [T, R / 2]; cache_NW [N, C + R], or bytes with the latents in FP8 (`mla_paged_decode` has the layout);
    slots_T [T] a row of the cache for each token. Where several tokens name one slot (padding does), any of them may
    end up there. No gradients.
    """
    require_shape(NAME, "weight_C", weight_C, (None,), "[C]")
    require_shape(NAME, "cos_TF", cos_TF, (None, None), "[T, R / 2]")
    tokens, pairs = cos_TF.shape
    latent, rope = weight_C.shape[0], 2 * pairs
    require_shape(NAME, "kv_TW", kv_TW, (tokens, latent + rope), "[T, C + R]")
    require_shape(NAME, "sin_TF", sin_TF, (tokens, pairs), "[T, R / 2]")
    require_shape(NAME, "slots_T", slots_T, (tokens,), "[T]")
    require_dtype(NAME, "slots_T", slots_T, INTEGERS)
    require(eps >= 0, NAME, "eps", f"is {eps}; expected a number that is not negative")
    require_dtype(NAME, "cache_NW", cache_NW, (*FLOATS, torch.uint8))
    if cache_NW.dtype == torch.uint8:
        if latent % SCALED_LATENTS:
            problem = f"has {latent} latents and cache_NW takes them in FP8, {SCALED_LATENTS} to a scale"
            require(False, NAME, "weight_C", f"{problem}; expected a multiple")
        meaning = "[N, bytes of C FP8 latents, their scales and R rope values]"
        require_shape(NAME, "cache_NW", cache_NW, (None, fp8_row_bytes(latent, rope)), meaning)
    else:
        require_shape(NAME, "cache_NW", cache_NW, (None, latent + rope), "[N, C + R]")
    require(cache_NW.is_contiguous(), NAME, "cache_NW", "is not contiguous; expected the cache itself, not a slice")
    floats = {"kv_TW": kv_TW, "weight_C": weight_C, "cos_TF": cos_TF, "sin_TF": sin_TF}
    tensors = {**floats, "cache_NW": cache_NW, "slots_T": slots_T}
    for argument, tensor in floats.items():
        require_dtype(NAME, argument, tensor, FLOATS)
    for argument, tensor in tensors.items():
        require_device(NAME, argument, tensor, kv_TW.device)
    if torch.is_grad_enabled():
        for argument, tensor in tensors.items():
            problem = "requires a gradient and a cache has none; call it under torch.no_grad()"
            require(not tensor.requires_grad, NAME, argument, problem)
    dispatch.run(NAME, kv_TW, weight_C, eps, cos_TF, sin_TF, cache_NW, slots_T)
