"""The operator through torch's scaled_dot_product_attention.

With one document a row it is plain causal attention, for which torch has fused kernels. With several it needs a dense
mask, which costs B · S · S values and the tiles that the mask hides: fine at a CPU's sizes.

Shapes: B rows, S positions, H query heads, G key/value heads, K key width, V value width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from .reference import seen


def packed_attention(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, starts_BS: Tensor | None, scale: float) -> Tensor:
    """See the operator's docstring."""
    mask_B1SN = None if starts_BS is None else seen(starts_BS, q_BSHK.shape[1], q_BSHK.device)[:, None]
    return fused(q_BSHK, k_BSGK, v_BSGV, mask_B1SN, scale)


def fused(q_BSHK: Tensor, k_BNGK: Tensor, v_BNGV: Tensor, mask_B1SN: Tensor | None, scale: float) -> Tensor:
    """Attention in the layout [B, S, heads, width], causal where there is no mask."""
    q, k, v = (t.transpose(1, 2) for t in (q_BSHK, k_BNGK, v_BNGV))
    narrower = k.shape[-1] - v.shape[-1]
    if narrower > 0 and v.device.type == "cpu":
        # torch's fused kernel for CPUs wants one width. Without the zeros the slow path runs: seven times slower for
        # forward and backward at 16 x 8 heads x 256 tokens, widths 32 and 16.
        v = functional.pad(v, (0, narrower))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask_B1SN, is_causal=mask_B1SN is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., : v_BNGV.shape[-1]].transpose(1, 2)
