"""The next token of each sequence: temperature, truncation, a draw that seed and position decide, its probability."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_device, require_dtype, require_shape

NAME = "draw_tokens"
GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them only makes infinities of what is already an argmax."""

dispatch.operator(
    NAME,
    {"reference": f"{__name__}.reference:draw_tokens", "triton": f"{__name__}.triton:draw_tokens"},
)


def draw_tokens(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    top_k_B: Tensor,
    seed_B: Tensor,
    position_B: Tensor,
    *,
    any_random: bool = True,
    any_truncated: bool = True,
) -> tuple[Tensor, Tensor]:
    """logits_BV [B, V] -> (tokens [B] int64, their log-probabilities [B] float64).

    logits_BV: -inf for what cannot be drawn; they are taken as float32. temperature_B, top_p_B, min_p_B: float32;
    top_k_B, seed_B, position_B: int64. A temperature below `GREEDY_BELOW` is greedy: of equal logits the first.
    Truncation comes after temperature: top_k (0 is off) keeps exactly k tokens, of equal ones the lower ids; top_p (1
    is off) the shortest beginning of what is left whose probability reaches p; min_p (0 is off) what is at least that
    share of the most probable token. The log-probability is of the distribution that was drawn from; of a greedy row,
    of the softmax of its logits. Logits that are not numbers give some token and a log-probability that is none.

    The draw is a race: each token gets an exponential number E that is a hash of seed, position and token, and the
    token with the largest probability / E wins. any_random, any_truncated: whether some row needs it, which the caller
    knows without asking the device; a row's result does not depend on it as long as it is true when the row does.
    """
    require_shape(NAME, "logits_BV", logits_BV, (None, None), "[B, V]")
    require_dtype(NAME, "logits_BV", logits_BV, FLOATS)
    require(logits_BV.shape[1] > 0, NAME, "logits_BV", "has no vocabulary; expected at least one token to draw")
    columns = {
        "temperature_B": (temperature_B, torch.float32),
        "top_p_B": (top_p_B, torch.float32),
        "min_p_B": (min_p_B, torch.float32),
        "top_k_B": (top_k_B, torch.int64),
        "seed_B": (seed_B, torch.int64),
        "position_B": (position_B, torch.int64),
    }
    for name, (tensor, dtype) in columns.items():
        require_shape(NAME, name, tensor, (logits_BV.shape[0],), "[B]")
        require_dtype(NAME, name, tensor, (dtype,))
        require_device(NAME, name, tensor, logits_BV.device)
    tensors = [tensor for tensor, _ in columns.values()]
    return dispatch.run(NAME, logits_BV, *tensors, any_random, any_truncated)
