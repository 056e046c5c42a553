"""Absorbed decode of multi-head latent attention over a paged cache, in plain torch (DeepSeek-V2, section 2.1).

With the up-projections absorbed into query and output, every head attends to the same keys: the latent vector and
the shared rope key of each token. The values are the latents themselves. A query sees the keys up to its own
position that lie inside its sequence's length; what stands in the cache beyond the length, NaN included, is not read.

The cache holds floats, or bytes with the latents in FP8. Then a token's row is, one after the other, its C latents in
e4m3, C / 128 scales in float32 (one for each 128 latents, `amax / 448` with amax at least 1e-4; it multiplies), and
its R rope values in bfloat16: 656 bytes for C = 512 and R = 64, against 1152 in bfloat16. The rope part stays in
bfloat16 because a score's sense of position hangs on those few values. Latents are `value · scale` rounded to bfloat16,
as the matrix units take them.

Shapes: B sequences, Q new tokens of each, H heads, C latent, R rope key, W = C + R cache width (of bytes:
C + 4 · C / 128 + 2 · R), N cache slots, P blocks of the longest sequence, K = P * block_size keys.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..fp8_blocks.reference import dequantise_fp8_blocks, quantise_fp8_blocks

SCALED_LATENTS = 128


def fp8_row_bytes(latent: int, rope: int) -> int:
    """Bytes that a token takes in a cache of FP8 latents."""
    return latent + 4 * (latent // SCALED_LATENTS) + 2 * rope


def pack_fp8_latents(latent_NC: Tensor, rope_NR: Tensor) -> Tensor:
    """Rows of a cache of FP8 latents -> bytes [N, W]. C is a multiple of 128."""
    values_NC, scale_NS = quantise_fp8_blocks(latent_NC, (1, SCALED_LATENTS))
    parts = (values_NC, scale_NS.float().contiguous(), rope_NR.to(torch.bfloat16).contiguous())
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1)


def unpack_fp8_latents(rows_NW: Tensor, latent: int) -> tuple[Tensor, Tensor]:
    """(latents [N, C], rope keys [N, R]) of rows of a cache of FP8 latents, both in bfloat16."""
    scale_bytes = 4 * (latent // SCALED_LATENTS)
    sizes = [latent, scale_bytes, rows_NW.shape[-1] - latent - scale_bytes]
    values, scale, rope = (part.contiguous() for part in rows_NW.split(sizes, dim=-1))
    latent_NC = dequantise_fp8_blocks(
        values.view(torch.float8_e4m3fn), scale.view(torch.float32), (1, SCALED_LATENTS), torch.bfloat16
    )
    return latent_NC, rope.view(torch.bfloat16)


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
    """softmax(scale · (q_latent · latent + q_rope · rope key)) · latent -> out_BQHC in q_latent's dtype."""
    batch, queries, heads, latent = q_latent_BQHC.shape
    wide = torch.promote_types(q_latent_BQHC.dtype, torch.float32)
    index_K = torch.arange(blocks_BP.shape[1] * block_size, device=cache_NW.device)
    slots_BK = (blocks_BP[:, :, None] * block_size + index_K[:block_size]).flatten(1)
    beyond_BK = index_K >= lengths_B[:, None]
    hidden_BQK = (index_K > positions_BQ[:, :, None]) | beyond_BK[:, None]

    if cache_NW.dtype == torch.uint8:
        rows_NW = cache_NW[slots_BK.flatten()]
        keys_BKW = torch.cat(unpack_fp8_latents(rows_NW, latent), dim=-1).view(*slots_BK.shape, -1).to(wide)
    else:
        # A row gather has ten times indexing's speed on a CPU.
        keys_BKW = functional.embedding(slots_BK, cache_NW).to(wide)
    # A weight of zero does not silence a NaN: what lies beyond the length has to go before the products.
    keys_BKW = keys_BKW.masked_fill(beyond_BK[:, :, None], 0.0)
    q_BXW = torch.cat((q_latent_BQHC, q_rope_BQHR), dim=-1).to(wide).flatten(1, 2)  # X = Q * H
    scores_BXK = (q_BXW * scale) @ keys_BKW.transpose(1, 2)
    hidden_BXK = hidden_BQK.repeat_interleave(heads, dim=1)
    # A query that sees nothing (an empty sequence) would give 0/0: its weights become zero, and so its output.
    weights_BXK = scores_BXK.masked_fill(hidden_BXK, -torch.inf).softmax(-1).masked_fill(hidden_BXK, 0.0)
    out_BXC = weights_BXK @ keys_BKW[:, :, :latent]
    return out_BXC.to(q_latent_BQHC.dtype).view(batch, queries, heads, latent)
