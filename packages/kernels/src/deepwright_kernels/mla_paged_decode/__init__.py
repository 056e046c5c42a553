"""Absorbed decode of multi-head latent attention over a paged latent cache. Inference only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, INTEGERS, AskedOnce, require, require_device, require_dtype, require_shape
from .reference import SCALED_LATENTS, fp8_row_bytes

NAME = "mla_paged_decode"
# What the kernel for Hopper is made for: DeepSeek-V2's and V3's widths, pages of as many keys as its tiles have.
HOPPER_LATENT, HOPPER_ROPE, HOPPER_BLOCK = 512, 64, 64
WIDEST_LATENT = 1024  # in Triton: what shared memory holds


def _why_not_hopper(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> str | None:
    if cache_NW.dtype != torch.bfloat16 or q_latent_BQHC.dtype != torch.bfloat16:
        return "its queries and its cache are bfloat16"
    latent, rope = q_latent_BQHC.shape[-1], q_rope_BQHR.shape[-1]
    if (latent, rope) != (HOPPER_LATENT, HOPPER_ROPE):
        return f"its widths are {HOPPER_LATENT} + {HOPPER_ROPE} and these are {latent} + {rope}"
    if block_size != HOPPER_BLOCK:
        return f"its blocks hold {HOPPER_BLOCK} tokens and these hold {block_size}"
    if cache_NW.stride(0) % 8 != 0 or cache_NW.shape[0] == 0:
        return "the copy engine wants cache rows that begin at multiples of 16 bytes"
    return f"it wants a positive scale and this is {scale}" if scale <= 0 else None


def _why_not_triton(q_latent_BQHC: Tensor, *_: Any) -> str | None:
    latent = q_latent_BQHC.shape[-1]
    return f"its latents are at most {WIDEST_LATENT} wide and these are {latent}" if latent > WIDEST_LATENT else None


def _why_not_gathered(q_latent_BQHC: Tensor, q_rope_BQHR: Tensor, cache_NW: Tensor, *_: Any) -> str | None:
    if q_latent_BQHC.device.type != "cpu":
        return f"it asks its result a question, for which a host would wait, and the tensor is on {cache_NW.device}"
    if cache_NW.dtype == torch.uint8:
        return "its cache holds floats and this one holds FP8 latents"
    return None if cache_NW.is_contiguous() else "its blocks are rows of a cache that is contiguous"


def _elsewhere(q_latent_BQHC: Tensor, *others: Any) -> tuple[str, ...]:
    gathered = not others or _why_not_gathered(q_latent_BQHC, *others) is None
    return ("torch", "reference") if gathered else ("reference",)


dispatch.operator(
    NAME,
    {
        "reference": f"{__name__}.reference:mla_paged_decode",
        "triton": f"{__name__}.triton:mla_paged_decode",
        "torch": f"{__name__}.gathered:mla_paged_decode",
        "cuda": f"{__name__}.hopper:mla_paged_decode",
    },
    cuda=("cuda", "triton", "reference"),
    elsewhere=_elsewhere,
    needs={"cuda": _why_not_hopper, "triton": _why_not_triton, "torch": _why_not_gathered},
)


def _require(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
) -> None:
    require_shape(NAME, "q_latent_BQHC", q_latent_BQHC, (None,) * 4, "[B, Q, H, C]")
    require_dtype(NAME, "q_latent_BQHC", q_latent_BQHC, FLOATS)
    batch, queries, heads, latent = q_latent_BQHC.shape
    require_shape(NAME, "q_rope_BQHR", q_rope_BQHR, (batch, queries, heads, None), "[B, Q, H, R]")
    require_dtype(NAME, "q_rope_BQHR", q_rope_BQHR, (q_latent_BQHC.dtype,))
    rope = q_rope_BQHR.shape[-1]
    require_dtype(NAME, "cache_NW", cache_NW, (*FLOATS, torch.uint8))
    if cache_NW.dtype == torch.uint8:
        require(
            latent % SCALED_LATENTS == 0,
            NAME,
            "cache_NW",
            f"holds FP8 latents, {SCALED_LATENTS} to a scale, but q_latent_BQHC has {latent}; expected a multiple",
        )
        require(
            rope % 2 == 0,
            NAME,
            "cache_NW",
            f"holds FP8 latents beside {rope} rope values; expected an even number, for a row's scales are float32",
        )
        meaning = f"[N, bytes of {latent} FP8 latents, their scales and {rope} rope values]"
        require_shape(NAME, "cache_NW", cache_NW, (None, fp8_row_bytes(latent, rope)), meaning)
        require(
            cache_NW.stride(0) % 4 == 0 and cache_NW.storage_offset() % 4 == 0,
            NAME,
            "cache_NW",
            f"has rows {cache_NW.stride(0)} bytes apart from byte {cache_NW.storage_offset()}; expected multiples of 4",
        )
    else:
        require_shape(NAME, "cache_NW", cache_NW, (None, latent + rope), "[N, C + R]")
    require_shape(NAME, "blocks_BP", blocks_BP, (batch, None), "[B, P]")
    require_shape(NAME, "positions_BQ", positions_BQ, (batch, queries), "[B, Q]")
    require_shape(NAME, "lengths_B", lengths_B, (batch,), "[B]")
    for argument, tensor in (("blocks_BP", blocks_BP), ("positions_BQ", positions_BQ), ("lengths_B", lengths_B)):
        require_dtype(NAME, argument, tensor, INTEGERS)
        require_device(NAME, argument, tensor, q_latent_BQHC.device)
    for argument, tensor in (
        ("q_latent_BQHC", q_latent_BQHC),
        ("q_rope_BQHR", q_rope_BQHR),
        ("cache_NW", cache_NW),
    ):
        require_device(NAME, argument, tensor, q_latent_BQHC.device)
        require(
            tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
            NAME,
            argument,
            f"has a last dimension of stride {tensor.stride(-1)}; expected its values side by side (stride 1)",
        )
        require(
            not (tensor.requires_grad and torch.is_grad_enabled()),
            NAME,
            argument,
            "requires a gradient and decode has none; call it under torch.no_grad()",
        )
    require(block_size > 0, NAME, "block_size", f"is {block_size}; expected a positive number of slots")
    require(
        cache_NW.shape[0] % block_size == 0,
        NAME,
        "cache_NW",
        f"has {cache_NW.shape[0]} slots; expected a multiple of block_size = {block_size}",
    )


_check = AskedOnce(_require)


def mla_paged_decode(
    q_latent_BQHC: Tensor,
    q_rope_BQHR: Tensor,
    cache_NW: Tensor,
    blocks_BP: Tensor,
    positions_BQ: Tensor,
    lengths_B: Tensor,
    block_size: int,
    scale: float,
) -> Tensor:
    """Attention of absorbed queries over latents and rope keys in a paged cache -> out_BQHC in q_latent's dtype.

    softmax(scale · (q_latent · latent + q_rope · rope key)) · latent, the keys being shared by all heads (DeepSeek-V2,
    section 2.1.2, with the up-projections absorbed).

    q_latent_BQHC [B, Q, H, C], q_rope_BQHR [B, Q, H, R]; cache_NW [N, C + R], latent first, rope key after it, or bytes
    [N, C + C / 32 + 2 · R] with the latents in FP8 (`reference.py` has the layout); blocks_BP [B, P] the blocks of each
    sequence in order; positions_BQ [B, Q] the absolute position of each query; lengths_B [B] the tokens cached. A
    query sees keys at index <= its position and < its sequence's length; one that sees none gives zeros. What the cache
    holds beyond the length is never used. No gradients.
    """
    _check(q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size)
    out_BQHC: Tensor = dispatch.run(
        NAME, q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size, scale
    )
    return out_BQHC
