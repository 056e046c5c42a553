"""RoPE and its extensions against their papers: angles by hand, the numbers of DeepSeek-V3 and Llama 3.1, and relative
positions."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from deepwright_core.model.config import Llama3RopeConfig, RopeConfig, YarnConfig
from deepwright_core.model.rope import Rotary, softmax_scale, yarn_mscale
from deepwright_kernels import rotary

V3 = YarnConfig(factor=40, original_positions=4096, beta_fast=32, beta_slow=1, mscale=1, mscale_all_dim=1)


def angles(config: RopeConfig, dim: int) -> list[float]:
    """The angle of each pair at position 1, read back from the table."""
    cos_F, sin_F = Rotary(dim, config, 2)(torch.tensor(1))
    return torch.atan2(sin_F.double(), cos_F.double()).tolist()


def test_plain_frequencies_are_powers_of_theta() -> None:
    want = [500.0 ** (-2 * pair / 8) for pair in range(4)]
    assert angles(RopeConfig(theta=500.0), 8) == pytest.approx(want, rel=1e-5)


def test_tables_are_looked_up_by_absolute_position() -> None:
    table = Rotary(6, RopeConfig(), 50)
    positions = torch.tensor([[0, 49], [7, 7]])
    cos, sin = table(positions)
    assert cos.shape == sin.shape == (2, 2, 3)
    for row in range(2):
        for column in range(2):
            for pair in range(3):
                angle = positions[row, column].item() * 10000.0 ** (-2 * pair / 6)
                assert cos[row, column, pair] == pytest.approx(math.cos(angle), abs=1e-5)
                assert sin[row, column, pair] == pytest.approx(math.sin(angle), abs=1e-5)


def test_yarn_of_deepseek_v3_pair_by_pair() -> None:
    """Pair i turns 4096 · θ^(-2i/64) / 2π times in the original context: pair 10 is the last with more than 32 turns
    (rounded down), pair 23 the first with less than one (rounded up). 16 lies 6/13 of the way."""
    plain = [10000.0 ** (-2 * pair / 64) for pair in range(32)]
    turns = [4096 * frequency / (2 * math.pi) for frequency in plain]
    assert turns[10] > 32 > turns[11] and turns[22] > 1 > turns[23]
    have = angles(RopeConfig(yarn=V3), 64)
    for pair in range(32):
        slowed = min(max((pair - 10) / 13, 0.0), 1.0)
        assert have[pair] == pytest.approx(plain[pair] * (1 - slowed) + plain[pair] / 40 * slowed, rel=1e-4), pair
    assert have[16] == pytest.approx(0.01 * (7 / 13 + 6 / 13 / 40), rel=1e-4)


@pytest.mark.parametrize(("dim", "theta", "original"), [(16, 10000.0, 64), (8, 100.0, 2048), (4, 10.0, 32)])
def test_yarn_keeps_fast_pairs_and_stretches_slow_ones(dim: int, theta: float, original: int) -> None:
    yarn = YarnConfig(factor=8, original_positions=original)
    pairs = list(
        zip(angles(RopeConfig(theta=theta), dim), angles(RopeConfig(theta=theta, yarn=yarn), dim), strict=True)
    )
    for plain, have in pairs:
        turns = original * plain / (2 * math.pi)
        if turns > 32 * theta ** (2 / dim):  # more than a whole pair faster than the bound, which rounding may move
            assert have == pytest.approx(plain, rel=1e-5)
        elif turns < theta ** (-2 / dim):
            assert have == pytest.approx(plain / 8, rel=1e-5)
        else:
            assert plain / 8 * 0.99999 <= have <= plain * 1.00001
    ratios = [round(have / plain, 5) for plain, have in pairs]
    assert ratios == sorted(ratios, reverse=True)


def test_factor_one_changes_nothing() -> None:
    config = RopeConfig(yarn=YarnConfig(factor=1, original_positions=64))
    assert angles(config, 16) == pytest.approx(angles(RopeConfig(), 16), rel=1e-6)
    assert softmax_scale(64, config) == 64**-0.5


def test_softmax_scale_of_deepseek_v3() -> None:
    assert yarn_mscale(40, 1.0) == pytest.approx(1 + 0.1 * math.log(40))
    assert softmax_scale(192, RopeConfig(yarn=V3)) * 192**0.5 == pytest.approx(1.87385, abs=1e-5)
    assert softmax_scale(192, RopeConfig()) == 192**-0.5
    # V2-Lite: mscale 0.707 in both places.
    lite = V3.model_copy(update={"mscale": 0.707, "mscale_all_dim": 0.707})
    assert softmax_scale(192, RopeConfig(yarn=lite)) * 192**0.5 == pytest.approx((0.0707 * math.log(40) + 1) ** 2)


def test_tables_carry_what_the_softmax_scale_does_not() -> None:
    """Where mscale and mscale_all_dim differ, cos and sin are scaled by the quotient; where they agree, by nothing."""
    zero = torch.tensor(0)
    assert Rotary(8, RopeConfig(yarn=V3), 1)(zero)[0].tolist() == [1.0] * 4
    only_mscale = RopeConfig(yarn=V3.model_copy(update={"mscale_all_dim": 0.0}))
    assert Rotary(8, only_mscale, 1)(zero)[0].tolist() == pytest.approx([1 + 0.1 * math.log(40)] * 4)
    assert softmax_scale(64, only_mscale) == 64**-0.5


def test_llama_3_1_pair_by_pair() -> None:
    """Pair i turns 8192 · θ^(-2i/128) / 2π times in the original context: pair 28 is the last with more than 4 turns,
    pair 35 the first with less than one. Between, a pair with t turns keeps (t - 1) / 3 of its frequency."""
    plain = [500000.0 ** (-2 * pair / 128) for pair in range(64)]
    turns = [8192 * frequency / (2 * math.pi) for frequency in plain]
    assert turns[28] > 4 > turns[29] and turns[34] > 1 > turns[35]
    have = angles(RopeConfig(theta=500000.0, llama3=Llama3RopeConfig()), 128)
    for pair in range(64):
        kept = min(max((turns[pair] - 1) / 3, 0.0), 1.0)
        assert have[pair] == pytest.approx(plain[pair] * kept + plain[pair] / 8 * (1 - kept), rel=1e-4), pair
    assert have[28] == pytest.approx(plain[28], rel=1e-6) and have[35] == pytest.approx(plain[35] / 8, rel=1e-6)


def test_llama_3_1_leaves_the_softmax_and_the_length_of_vectors_alone() -> None:
    config = RopeConfig(theta=500000.0, llama3=Llama3RopeConfig(factor=32))
    assert softmax_scale(128, config) == 128**-0.5
    assert Rotary(8, config, 1)(torch.tensor(0))[0].tolist() == [1.0] * 4


def test_one_extension_of_the_context_at_most() -> None:
    with pytest.raises(ValidationError, match="yarn and llama3 are both given; expected at most one"):
        RopeConfig(yarn=YarnConfig(), llama3=Llama3RopeConfig())
    with pytest.raises(ValidationError, match="high_freq_factor is 1; expected more than low_freq_factor, which is 1"):
        Llama3RopeConfig(high_freq_factor=1.0)


def test_pairs_are_interleaved_and_turned_as_complex_numbers() -> None:
    x_R = torch.tensor([1.0, 2.0, -3.0, 0.5])
    table = Rotary(4, RopeConfig(theta=100.0), 10)
    have = rotary(x_R, *table(torch.tensor(7)))
    turned = [complex(1, 2) * cmath.exp(7j), complex(-3, 0.5) * cmath.exp(0.7j)]
    want = [part for z in turned for part in (z.real, z.imag)]
    torch.testing.assert_close(have, torch.tensor(want))


def test_scores_depend_on_the_distance_alone() -> None:
    torch.manual_seed(0)
    q_R, k_R = torch.randn(2, 8)
    table = Rotary(8, RopeConfig(yarn=YarnConfig(factor=4, original_positions=16)), 64)

    def score(query: int, key: int) -> float:
        return float(rotary(q_R, *table(torch.tensor(query))) @ rotary(k_R, *table(torch.tensor(key))))

    assert score(9, 4) == pytest.approx(score(60, 55), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2


def test_tables_are_not_saved() -> None:
    assert Rotary(8, RopeConfig(), 4).state_dict() == {}


@pytest.mark.parametrize("cast", [torch.nn.Module.bfloat16, torch.nn.Module.half])
def test_tables_stay_float32_in_a_narrower_model(cast: Any) -> None:
    whole, position = Rotary(8, RopeConfig(), 64), torch.tensor(63)
    narrow = cast(torch.nn.Sequential(torch.nn.Linear(2, 2), Rotary(8, RopeConfig(), 64)))
    assert narrow[0].weight.dtype.itemsize == 2
    for have, want in zip(narrow[1](position), whole(position), strict=True):
        assert have.dtype == torch.float32 and torch.equal(have, want)
    assert narrow.double()[1](position)[0].dtype == torch.float64
    assert narrow.to("meta")[1].cos_MF.is_meta  # other moves reach the tables as they reach the weights
