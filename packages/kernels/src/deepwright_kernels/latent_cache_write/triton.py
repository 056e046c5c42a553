"""Writing new tokens into the cache of latent attention as one Triton kernel.

A program takes a few tokens: it reads their rows once, norms and rotates in registers, finds the scales of FP8 latents
there too, and writes each row into its slot. A row of FP8 latents is three arrays one after the other, so the kernel
gets three views of the cache: of bytes, of float32 and of bfloat16.

Shapes: T tokens, C latent in S groups of G = 128 with a scale each, R = 2 · F rope key, W a slot's values, N slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fp8_blocks.reference import E4M3_MAX, SMALLEST_AMAX
from ..fp8_rows.triton import to_e4m3
from ..mla_paged_decode.reference import SCALED_LATENTS

VALUES_PER_PROGRAM = 4096


@triton.jit
def _kernel(
    kv_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    cache_ptr,
    scales_ptr,
    ropes_ptr,
    slots_ptr,
    tokens,
    latent,
    rope,
    kv_stride,
    cos_stride,
    sin_stride,
    cache_stride,
    scales_stride,
    ropes_stride,
    scales_start,
    ropes_start,
    eps,
    FP8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    token_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real_T = token_T < tokens
    slot_T = tl.load(slots_ptr + token_T, mask=real_T, other=0).to(tl.int64)
    row_T = kv_ptr + token_T.to(tl.int64) * kv_stride

    column_C = tl.arange(0, BLOCK_C)
    inside_TC = real_T[:, None] & (column_C < latent)[None, :]
    raw_TC = tl.load(row_T[:, None] + column_C[None, :], mask=inside_TC, other=0.0)
    wide_TC = raw_TC.to(tl.float32)
    weight_C = tl.load(weight_ptr + column_C, mask=column_C < latent, other=0.0).to(tl.float32)
    norm_T = tl.rsqrt(tl.sum(wide_TC * wide_TC, axis=1) / latent + eps)
    latent_TC = (wide_TC * norm_T[:, None] * weight_C[None, :]).to(raw_TC.dtype)
    if FP8:
        latent_TSG = tl.reshape(latent_TC.to(tl.float32), (BLOCK_T, BLOCK_C // GROUP, GROUP))
        amax_TS = tl.maximum(tl.max(tl.abs(latent_TSG), axis=2), SMALLEST)
        scale_TS = tl.div_rn(amax_TS, LARGEST)
        values_TSG = to_e4m3(latent_TSG * tl.div_rn(1.0, scale_TS)[:, :, None])
        bytes_TC = tl.reshape(values_TSG, (BLOCK_T, BLOCK_C)).to(tl.uint8, bitcast=True)
        tl.store(cache_ptr + (slot_T * cache_stride)[:, None] + column_C[None, :], bytes_TC, mask=inside_TC)
        group_S = tl.arange(0, BLOCK_C // GROUP)
        tl.store(
            scales_ptr + (slot_T * scales_stride + scales_start)[:, None] + group_S[None, :],
            scale_TS,
            mask=real_T[:, None] & (group_S * GROUP < latent)[None, :],
        )
    else:
        stored_TC = latent_TC.to(cache_ptr.dtype.element_ty)
        tl.store(cache_ptr + (slot_T * cache_stride)[:, None] + column_C[None, :], stored_TC, mask=inside_TC)

    column_R, pair_F = tl.arange(0, 2 * BLOCK_F), tl.arange(0, BLOCK_F)
    inside_TR = real_T[:, None] & (column_R < rope)[None, :]
    inside_TF = real_T[:, None] & (2 * pair_F < rope)[None, :]
    rope_TR = tl.load(row_T[:, None] + latent + column_R[None, :], mask=inside_TR, other=0.0)
    even_TF, odd_TF = tl.split(tl.reshape(rope_TR.to(tl.float32), (BLOCK_T, BLOCK_F, 2)))
    cos_TF = tl.load(cos_ptr + (token_T * cos_stride)[:, None] + pair_F[None, :], mask=inside_TF, other=0.0)
    sin_TF = tl.load(sin_ptr + (token_T * sin_stride)[:, None] + pair_F[None, :], mask=inside_TF, other=0.0)
    cos_TF, sin_TF = cos_TF.to(tl.float32), sin_TF.to(tl.float32)
    turned_TF2 = tl.join(even_TF * cos_TF - odd_TF * sin_TF, even_TF * sin_TF + odd_TF * cos_TF)
    turned_TR = tl.reshape(turned_TF2, (BLOCK_T, 2 * BLOCK_F)).to(rope_TR.dtype).to(ropes_ptr.dtype.element_ty)
    tl.store(ropes_ptr + (slot_T * ropes_stride + ropes_start)[:, None] + column_R[None, :], turned_TR, mask=inside_TR)


def _launch(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TF: Tensor, sin_TF: Tensor, cache_NW: Tensor, slots_T: Tensor
) -> None:
    tokens, pairs = cos_TF.shape
    if tokens == 0:
        return
    latent = weight_C.shape[0]
    fp8 = cache_NW.dtype == torch.uint8
    scales, ropes, scales_start, ropes_start = cache_NW, cache_NW, 0, latent
    if fp8:
        scales, scales_start = cache_NW.view(torch.float32), latent // 4
        ropes, ropes_start = cache_NW.view(torch.bfloat16), latent // 2 + 2 * (latent // SCALED_LATENTS)
    kv_TW, cos_TF, sin_TF = (t if t.stride(-1) == 1 else t.contiguous() for t in (kv_TW, cos_TF, sin_TF))
    # Powers of two by hand: triton's own function takes a host 2 µs a call.
    block = 1 << (latent - 1).bit_length()
    block_tokens = min(1 << (tokens - 1).bit_length(), max(1, VALUES_PER_PROGRAM // block))
    _kernel[(-(-tokens // block_tokens),)](
        kv_TW,
        weight_C.contiguous(),
        cos_TF,
        sin_TF,
        cache_NW,
        scales,
        ropes,
        slots_T.contiguous(),
        tokens,
        latent,
        2 * pairs,
        kv_TW.stride(0),
        cos_TF.stride(0),
        sin_TF.stride(0),
        cache_NW.stride(0),
        scales.stride(0),
        ropes.stride(0),
        scales_start,
        ropes_start,
        eps,
        FP8=fp8,
        LARGEST=E4M3_MAX,
        SMALLEST=SMALLEST_AMAX,
        GROUP=SCALED_LATENTS,
        BLOCK_T=block_tokens,
        BLOCK_C=block,
        BLOCK_F=1 << (pairs - 1).bit_length(),
        num_warps=4,
    )


@torch.library.custom_op("deepwright::latent_cache_write", mutates_args=("cache_NW",))
def _write(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TF: Tensor, sin_TF: Tensor, cache_NW: Tensor, slots_T: Tensor
) -> None:
    _launch(kv_TW, weight_C, eps, cos_TF, sin_TF, cache_NW, slots_T)


def latent_cache_write(
    kv_TW: Tensor, weight_C: Tensor, eps: float, cos_TF: Tensor, sin_TF: Tensor, cache_NW: Tensor, slots_T: Tensor
) -> None:
    """See the operator's docstring."""
    # Outside a traced graph the operator's dispatch would take a host longer than the kernel does a GPU.
    write = _write if torch.compiler.is_compiling() else _launch
    write(kv_TW, weight_C, eps, cos_TF, sin_TF, cache_NW, slots_T)
