"""Draws tokens: vectorised over the batch, and independent of it.

Randomness is a counter, not a state. At every position, each token of the vocabulary gets an exponential number E, a
hash of the request's seed, the position and the token, and the token with the largest probability / E is drawn: the
first to arrive when tokens arrive at rates of their probabilities. So a request draws the same tokens whatever runs
beside it, after a preemption, and on every device whose logits agree. And two distributions that are nearly the same
mostly draw the same token, which is what `speculation` lives on (inverting one cumulated distribution with one number
would shift all later tokens whenever an early one gains a little).

The operator `draw_tokens` does it: on a GPU one kernel, elsewhere plain torch. Left out: penalties, biases, bans and
grammars (`controls` changes the logits before they come here).

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deepwright_kernels import draw_tokens


@dataclass(frozen=True)
class SamplingRows:
    """The sampling parameters of a batch, one tensor a parameter."""

    temperature_B: Tensor  # float32
    top_p_B: Tensor  # float32
    min_p_B: Tensor  # float32
    top_k_B: Tensor  # int64
    seed_B: Tensor  # int64

    def columns(self) -> tuple[Tensor, ...]:
        """All of them, in order."""
        return self.temperature_B, self.top_p_B, self.min_p_B, self.top_k_B, self.seed_B

    def first(self, count: int) -> SamplingRows:
        """Views of the first rows."""
        return SamplingRows(*(column[:count] for column in self.columns()))

    def repeated(self, times: int) -> SamplingRows:
        """Each row `times` times, one after the other."""
        if times == 1:
            return self
        return SamplingRows(*(column.repeat_interleave(times) for column in self.columns()))


def sample(
    logits_BV: Tensor, rows: SamplingRows, position_B: Tensor, *, any_random: bool, any_truncated: bool
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row: (int64 ids, float64 log-probabilities under the distribution drawn from).

    any_random, any_truncated: whether some row needs it. The caller knows that on the host; asking the tensors would
    make the host wait. A row's result does not depend on them as long as they are true when it needs them.
    """
    return draw_tokens(
        logits_BV,
        rows.temperature_B,
        rows.top_p_B,
        rows.min_p_B,
        rows.top_k_B,
        rows.seed_B,
        position_B,
        any_random=any_random,
        any_truncated=any_truncated,
    )
