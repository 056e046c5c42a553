"""The sampler against plain Python on one row, against statistics, and against its neighbours in the batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_core.engine.sampler import SamplingRows, sample
from deepwright_core.engine.sequence import SamplingParams
from deepwright_core.errors import RequestError
from deepwright_kernels.draw_tokens.reference import uniform

MASK = (1 << 64) - 1


def rows(*params: SamplingParams) -> SamplingRows:
    return SamplingRows(
        temperature_B=torch.tensor([float(p.temperature) for p in params]),
        top_p_B=torch.tensor([float(p.top_p) for p in params]),
        min_p_B=torch.tensor([float(p.min_p) for p in params]),
        top_k_B=torch.tensor([p.top_k for p in params]),
        seed_B=torch.tensor([p.seed for p in params]),
    )


def draw(logits_BV: torch.Tensor, *params: SamplingParams, position: int = 0) -> tuple[list[int], list[float]]:
    tokens, logprobs = sample(
        logits_BV,
        rows(*params),
        torch.full((len(params),), position),
        any_random=any(not p.greedy for p in params),
        any_truncated=any(p.truncated for p in params),
    )
    return tokens.tolist(), logprobs.tolist()


def distribution(logits: list[float], p: SamplingParams) -> list[float]:
    """The definition: temperature, top_k, top_p of what is left, min_p, one after the other."""
    weights = [math.exp((x - max(logits)) / p.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))[: p.top_k or None]
    total, before, kept = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if p.top_p == 1 or before < p.top_p * total:
            kept.append(i)
        before += weights[i]
    kept = [i for i in kept if weights[i] >= p.min_p * weights[order[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


def many(logits: list[float], p: SamplingParams, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws at `count` positions of one seed."""
    one = rows(p)
    batch = SamplingRows(*(getattr(one, name).expand(count) for name in one.__dataclass_fields__))
    logits_BV = torch.tensor([logits]).expand(count, -1)
    return sample(logits_BV, batch, torch.arange(count), any_random=True, any_truncated=p.truncated)


def mix(x: int, shifts: tuple[int, int, int], multipliers: tuple[int, int], mask: int) -> int:
    x = ((x ^ (x >> shifts[0])) * multipliers[0]) & mask
    x = ((x ^ (x >> shifts[1])) * multipliers[1]) & mask
    return x ^ (x >> shifts[2])


def mix_64(x: int) -> int:
    return mix(x & MASK, (30, 27, 31), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB), MASK)


def mix_32(x: int) -> int:
    return mix(x, (16, 15, 16), (0x7FEB352D, 0x846CA68B), 0xFFFFFFFF)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_uniform_is_the_unsigned_hash(seed: int, position: int) -> None:
    gamma = 0x9E3779B97F4A7C15
    key = mix_64(mix_64(seed * gamma + gamma) + position * gamma)
    bits = [mix_32(mix_32((token * 0x9E3779B9 ^ key) & 0xFFFFFFFF) ^ key >> 32) for token in (1, 2, 3)]
    want = [((b & 0x7FFFFFFF) + 0.5) / 2**31 for b in bits]
    assert uniform(torch.tensor([seed]), torch.tensor([position]), 3).tolist()[0] == pytest.approx(want, rel=1e-7)


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    positions = torch.arange(4096)
    columns = [uniform(torch.full_like(positions, seed), positions, 2)[:, i] for seed in range(2) for i in range(2)]
    for u in columns:
        counts = torch.histc(u.float(), bins=16, min=0, max=1)
        assert ((counts - 256) ** 2 / 256).sum() < 45  # chi-squared of 15 degrees exceeds that once in 10,000
    together = torch.stack([*columns, columns[0].roll(1)])
    assert (torch.corrcoef(together) - torch.eye(5)).abs().max() < 0.07


SETTINGS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0, top_k=3),
    SamplingParams(top_p=0.7),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=1.5, top_k=5, top_p=0.8, min_p=0.1),
    SamplingParams(top_k=1),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=100),
]
LOGITS = [0.3, -1.0, 2.0, 1.9, 0.0, -5.0, 1.0, 0.3]


@pytest.mark.parametrize("p", SETTINGS)
def test_draws_follow_the_distribution_and_log_probabilities_tell_it(p: SamplingParams) -> None:
    want = distribution(LOGITS, p)
    tokens, logprobs = many(LOGITS, p, 4000)
    for token, logprob in {(int(t), float(lp)) for t, lp in zip(tokens, logprobs, strict=True)}:
        assert logprob == pytest.approx(math.log(want[token]), abs=1e-5)
    counts = torch.bincount(tokens, minlength=len(LOGITS)).tolist()
    for count, probability in zip(counts, want, strict=True):
        assert (
            count == 0 if probability == 0 else abs(count - 4000 * probability) < 4.5 * (4000 * probability) ** 0.5 + 1
        )


def test_distributions_that_are_nearly_the_same_nearly_always_draw_the_same_token() -> None:
    """Moving 5 % of the probability moves 5 % of the draws and a little more, wherever in the vocabulary it happens."""
    logits_V = torch.zeros(64)
    for token in (0, 31, 63):
        weights_V = torch.full((64,), 0.95 / 64)
        weights_V[token] += 0.05
        one, other = (many(x.tolist(), SamplingParams(), 4000)[0] for x in (logits_V, weights_V.log()))
        differing = float((one != other).float().mean())
        assert 0.03 < differing < 0.1


def test_ties_are_cut_to_exactly_k() -> None:
    tokens, logprobs = many([1.0] * 6, SamplingParams(top_k=4), 500)
    assert set(tokens.tolist()) == {0, 1, 2, 3}
    assert logprobs.tolist() == pytest.approx([math.log(1 / 4)] * 500)


def test_greedy_is_argmax_whatever_the_other_fields_say() -> None:
    logits_BV = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    p = SamplingParams(temperature=0, top_k=7, top_p=0.3, min_p=0.4)
    for neighbours in ([], [SamplingParams(top_p=0.5)]):
        batch = torch.cat([logits_BV, logits_BV[: len(neighbours)]])
        tokens, logprobs = draw(batch, *[p] * 5, *neighbours)
        assert tokens[:5] == logits_BV.argmax(-1).tolist()
        assert logprobs[:5] == pytest.approx(logits_BV.log_softmax(-1).max(-1).values.tolist(), abs=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_BV = torch.randn(40, 200, generator=generator)
    params = [
        SamplingParams(temperature=(i % 4) / 2, top_k=(i % 3) * 9, top_p=1 - (i % 2) / 3, seed=i) for i in range(40)
    ]
    tokens, logprobs = draw(logits_BV, *params, position=17)
    for i, p in enumerate(params):
        (token,), (logprob,) = draw(logits_BV[i : i + 1], p, position=17)
        assert token == tokens[i]
        assert logprob == pytest.approx(logprobs[i], abs=1e-12)


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e4])
def test_extreme_temperatures_and_logits_stay_finite(temperature: float) -> None:
    logits_BV = torch.tensor([[-1e30, 1e4, 1e4 - 1, -float("inf")]])
    (token,), (logprob,) = draw(logits_BV, SamplingParams(temperature=temperature, top_p=0.9))
    assert token in (1, 2)
    assert math.isfinite(logprob)


def test_no_token_of_probability_zero_is_drawn_at_the_ends() -> None:
    impossible = -float("inf")
    tokens, _ = many([impossible, 0.0, 0.0, impossible], SamplingParams(), 2000)
    assert set(tokens.tolist()) == {1, 2}


def test_logits_that_are_not_numbers_give_a_log_probability_that_is_none() -> None:
    for p in (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=2)):
        (token,), (logprob,) = draw(torch.tensor([[0.0, float("nan"), 1.0]]), p)
        assert 0 <= token < 3
        assert math.isnan(logprob)


def test_meaningless_parameters_are_refused_together() -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(max_tokens=0, temperature=-1, top_p=0, top_k=-1, min_p=2)
    assert [problem.split()[0] for problem in error.value.problems] == [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
    ]
