"""Rotary position embedding over interleaved pairs, of a whole vector or of its last part, with a gradient for the
input."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_device, require_dtype, shape_of

ROTARY, TAIL = "rotary", "rotary_tail"
for name in (ROTARY, TAIL):
    dispatch.operator(
        name,
        {
            "reference": f"{__name__}.reference:{name}",
            "triton": f"{__name__}.triton:{name}",
            "torch": f"{__name__}.complex_product:{name}",
        },
        elsewhere=("torch", "reference"),
    )


def _check_angles(operator: str, x: Tensor, cos: Tensor, sin: Tensor, pairs: int) -> None:
    if cos.shape != sin.shape:
        problem = f"has shape {shape_of(sin)} and cos {shape_of(cos)}; expected equal"
        require(False, operator, "sin", problem)
    for argument, tensor in (("cos", cos), ("sin", sin)):
        require_dtype(operator, argument, tensor, FLOATS)
        require_device(operator, argument, tensor, x.device)
    # By hand: torch.broadcast_shapes takes a host as long as two launches.
    target, leading = (*x.shape[:-1], pairs), cos.shape[:-1]
    fits = cos.ndim <= len(target) and cos.shape[-1:] == (pairs,)
    if not (fits and all(size in (1, want) for size, want in zip(leading[::-1], target[-2::-1], strict=False))):
        require(False, operator, "cos", f"has shape {shape_of(cos)}, which does not broadcast to {list(target)}")


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[..., 2i], x[..., 2i+1]) by the angles in cos and sin.

    x [..., R]; cos and sin [..., R/2] with the same shape, broadcastable to x's leading dimensions: for x [B, S, H, R]
    give [B, S, 1, R/2] or [S, 1, R/2]. They get no gradient.
    """
    require_dtype(ROTARY, "x", x, FLOATS)
    if x.ndim < 1 or x.shape[-1] % 2:
        require(False, ROTARY, "x", f"has shape {shape_of(x)}; expected an even last size")
    _check_angles(ROTARY, x, cos, sin, x.shape[-1] // 2)
    y: Tensor = dispatch.run(ROTARY, x, cos, sin)
    return y


def rotary_tail(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., P + R] with its last R values turned as `rotary` does and the first P as they are, in one pass.

    cos and sin [..., R/2] say what R is; otherwise as for `rotary`. For the queries of latent attention, [nope | rope].
    """
    require_dtype(TAIL, "x", x, FLOATS)
    require(x.ndim >= 1, TAIL, "x", "has no dimensions; expected [..., P + R]")
    require(cos.ndim >= 1, TAIL, "cos", "has no dimensions; expected [..., R/2]")
    pairs = cos.shape[-1]
    if 2 * pairs > x.shape[-1]:
        problem = f"has {pairs} angles, which turn {2 * pairs} values, and x has {x.shape[-1]}; expected at most half"
        require(False, TAIL, "cos", problem)
    _check_angles(TAIL, x, cos, sin, pairs)
    y: Tensor = dispatch.run(TAIL, x, cos, sin)
    return y
