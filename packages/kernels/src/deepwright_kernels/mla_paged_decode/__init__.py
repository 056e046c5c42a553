"""Absorbed decode of multi-head latent attention over a paged latent cache. Inference only."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, INTEGERS, require, require_device, require_dtype, require_shape

NAME = "mla_paged_decode"
dispatch.operator(
    NAME, {"reference": f"{__name__}.reference:mla_paged_decode", "triton": f"{__name__}.triton:mla_paged_decode"}
)


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

    q_latent_BQHC [B, Q, H, C], q_rope_BQHR [B, Q, H, R]; cache_NW [N, C + R], latent first, rope key after it;
    blocks_BP [B, P] the blocks of each sequence in order; positions_BQ [B, Q] the absolute position of each query;
    lengths_B [B] the tokens cached. A query sees keys at index <= its position and < its sequence's length; one that
    sees none gives zeros. The cache is read only below the length. No gradients.
    """
    require_shape(NAME, "q_latent_BQHC", q_latent_BQHC, (None,) * 4, "[B, Q, H, C]")
    require_dtype(NAME, "q_latent_BQHC", q_latent_BQHC, FLOATS)
    batch, queries, heads, latent = q_latent_BQHC.shape
    require_shape(NAME, "q_rope_BQHR", q_rope_BQHR, (batch, queries, heads, None), "[B, Q, H, R]")
    require_dtype(NAME, "q_rope_BQHR", q_rope_BQHR, (q_latent_BQHC.dtype,))
    width = latent + q_rope_BQHR.shape[-1]
    require_shape(NAME, "cache_NW", cache_NW, (None, width), "[N, C + R]")
    require_dtype(NAME, "cache_NW", cache_NW, FLOATS)
    require_shape(NAME, "blocks_BP", blocks_BP, (batch, None), "[B, P]")
    require_shape(NAME, "positions_BQ", positions_BQ, (batch, queries), "[B, Q]")
    require_shape(NAME, "lengths_B", lengths_B, (batch,), "[B]")
    for argument, tensor in (("blocks_BP", blocks_BP), ("positions_BQ", positions_BQ), ("lengths_B", lengths_B)):
        require_dtype(NAME, argument, tensor, INTEGERS)
        require_device(NAME, argument, tensor, q_latent_BQHC.device)
    for argument, tensor in (("q_rope_BQHR", q_rope_BQHR), ("cache_NW", cache_NW)):
        require_device(NAME, argument, tensor, q_latent_BQHC.device)
    require(block_size > 0, NAME, "block_size", f"is {block_size}; expected a positive number of slots")
    require(
        cache_NW.shape[0] % block_size == 0,
        NAME,
        "cache_NW",
        f"has {cache_NW.shape[0]} slots; expected a multiple of block_size = {block_size}",
    )
    out_BQHC: Tensor = dispatch.run(
        NAME, q_latent_BQHC, q_rope_BQHR, cache_NW, blocks_BP, positions_BQ, lengths_B, block_size, scale
    )
    return out_BQHC
