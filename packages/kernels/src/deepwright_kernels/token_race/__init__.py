"""Draw the next token of each row of logits, and say how probable it was. Inference only."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from ..arguments import FLOATS, require, require_device, require_dtype, require_shape

NAME = "token_race"
dispatch.operator(
    NAME,
    {"reference": f"{__name__}.reference:token_race", "triton": f"{__name__}.triton:token_race"},
)


def token_race(
    logits_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, position_B: Tensor, greedy_below: float, any_random: bool
) -> tuple[Tensor, Tensor]:
    """Tokens [B] int64, each drawn from softmax(logits / temperature), and their log-probabilities [B] float64.

    At every position, each token of the vocabulary gets an exponential number E, a hash of seed, position and token
    (`reference.uniform`), and the token with the largest probability / E is drawn: the first to arrive when tokens
    arrive at rates of their probabilities. So the same seed and position draw the same token whatever other rows there
    are, and on every device whose logits agree.

    logits_BV [B, V], -inf for what cannot be drawn; temperature_B [B] float32; seed_B, position_B [B] int64. A row
    whose temperature is below `greedy_below` takes its most probable token, of equals the first, and has its
    log-probability at temperature 1. any_random: whether some row has a higher one. Logits that are not numbers give
    some token with a log-probability that is not a number.
    """
    require_shape(NAME, "logits_BV", logits_BV, (None, None), "[B, V]")
    require_dtype(NAME, "logits_BV", logits_BV, FLOATS)
    rows, vocabulary = logits_BV.shape
    require(vocabulary > 0, NAME, "logits_BV", "has no vocabulary; expected at least one token to draw")
    for argument, tensor, dtype in (
        ("temperature_B", temperature_B, torch.float32),
        ("seed_B", seed_B, torch.int64),
        ("position_B", position_B, torch.int64),
    ):
        require_shape(NAME, argument, tensor, (rows,), "[B]")
        require_dtype(NAME, argument, tensor, (dtype,))
        require_device(NAME, argument, tensor, logits_BV.device)
    require(greedy_below > 0, NAME, "greedy_below", f"is {greedy_below}; expected a positive temperature")
    token_B, logprob_B = dispatch.run(NAME, logits_BV, temperature_B, seed_B, position_B, greedy_below, any_random)
    return token_B, logprob_B
