"""Rollouts: the engine samples a group of answers to each problem, the verifier scores them.

Shapes: P problems, G samples of each, B = P·G samples, S tokens of the longest (prompt and completion).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.evaluation import Answered, Scorer, mark
from deepwright_core.tasks import Problem
from deepwright_core.tokenizer import Tokenizer

from .reward import Reward


@dataclass(frozen=True)
class Rollouts:
    """A batch of scored samples, group by group.

    prompts, samples, sampler_logps, forced: one a sample. sampler_logps are those of the engine, one a drawn token.
    forced: which tokens of the completion were put there instead of drawn (by control of thinking); empty: none.
    finished: False for samples cut off by the token limit. rewards_PG: weighted sums; parts: each reward's mean.
    """

    prompts: list[list[int]]
    samples: list[Answered]
    sampler_logps: list[list[float]]
    finished: list[bool]
    rewards_PG: Tensor
    parts: dict[str, float]
    forced: list[list[bool]] = field(default_factory=list)


def roll_out(
    engine: Engine,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    score: Scorer,
    rewards: Mapping[str, tuple[float, Reward]],
    *,
    group_size: int,
    temperature: float,
    max_tokens: int,
    seed: int,
) -> Rollouts:
    """Sample `group_size` completions of each problem and reward them. Draws depend on nothing but `seed`."""
    repeated = [problem for problem in problems for _ in range(group_size)]
    prompts = [tokenizer.chat([{"role": "user", "content": problem.question}]) for problem in repeated]
    params = [
        SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed + n) for n in range(len(repeated))
    ]
    completions = engine.generate(prompts, params)
    samples = mark(tokenizer, repeated, completions, score)
    values = {label: [reward(sample) for sample in samples] for label, (_, reward) in rewards.items()}
    total = [sum(rewards[label][0] * values[label][n] for label in values) for n in range(len(samples))]
    return Rollouts(
        prompts,
        samples,
        [drawn(completion.logprobs, completion.forced) for completion in completions],
        [completion.finish_reason == "stop" for completion in completions],
        torch.tensor(total, dtype=torch.float32).view(len(problems), group_size),
        {label: sum(v) / len(v) for label, v in values.items()},
        [list(completion.forced) for completion in completions],
    )


def drawn(logprobs: Sequence[float], forced: Sequence[bool]) -> list[float]:
    """The log-probabilities of the tokens that were drawn."""
    return [logprob for logprob, put in zip(logprobs, forced, strict=True) if not put] if forced else list(logprobs)


@dataclass(frozen=True)
class ScoredTokens:
    """Samples as a padded batch for scoring. mask_BS is True at inputs whose *next* token is a completion token:
    the first completion token is scored by the last prompt position, the end token is trained, padding is not, nor is
    what no policy drew."""

    tokens_BS1: Tensor
    mask_BS: Tensor
    real_BS: Tensor


def pad(
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    pad_id: int,
    forced: Sequence[list[bool]] | None = None,
) -> ScoredTokens:
    """Right-pad prompts with their completions. Masks go by length, so a completion may hold the padding id.

    forced: for each completion, which of its tokens leave the mask; empty where none does.
    """
    size = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    tokens_BS1 = torch.full((len(prompts), size), pad_id, dtype=torch.int64)
    mask_BS = torch.zeros(len(prompts), size - 1, dtype=torch.bool)
    real_BS = torch.zeros(len(prompts), size - 1, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        both = prompt + completion
        tokens_BS1[row, : len(both)] = torch.tensor(both)
        mask_BS[row, len(prompt) - 1 : len(both) - 1] = True
        if forced is not None and forced[row]:
            mask_BS[row, len(prompt) - 1 : len(both) - 1] = ~torch.tensor(forced[row])
        real_BS[row, : len(both) - 1] = True
    return ScoredTokens(tokens_BS1, mask_BS, real_BS)
