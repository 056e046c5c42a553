"""The race for the next token: kernel against reference."""

import pytest
import torch

from deepwright_kernels import dispatch

from .sides import DEVICE, draw


def race(logits_BV: torch.Tensor, temperatures: list[float], any_random: bool) -> list[tuple[torch.Tensor, ...]]:
    rows = len(logits_BV)
    seed_B = torch.arange(rows, device=DEVICE) * 7 - 3
    position_B = torch.arange(rows, device=DEVICE) + 2**33
    temperature_B = torch.tensor(temperatures, device=DEVICE)
    return [
        dispatch.load("token_race", backend)(logits_BV, temperature_B, seed_B, position_B, 1e-5, any_random)
        for backend in ("reference", "triton")
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 3, 1000, 5000])
def test_the_same_tokens_as_probable(vocabulary: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocabulary)
    logits_BV = (3 * draw(9, vocabulary)).to(dtype)
    for temperatures, any_random in (([0.0] * 9, False), ([0.0, 1.0, 0.3, 2.0, 0.0, 1e-4, 1.0, 0.7, 5.0], True)):
        want, have = race(logits_BV, temperatures, any_random)
        assert torch.equal(have[0], want[0])
        torch.testing.assert_close(have[1], want[1], rtol=1e-5, atol=1e-5)
        assert have[1].dtype == torch.float64


def test_equal_logits_and_logits_that_cannot_be_drawn() -> None:
    logits_BV = torch.zeros(4, 4500, device=DEVICE)
    logits_BV[1:, 2:] = -torch.inf
    logits_BV[3, :2] = -torch.inf
    logits_BV[3, 4200] = 1.0
    (token_B, logprob_B), (have_B, have_logprob_B) = race(logits_BV, [0.0, 0.0, 1.0, 1.0], True)
    assert torch.equal(have_B, token_B)
    assert have_B.tolist()[:2] == [0, 0]
    assert have_B[2] < 2
    assert have_B[3] == 4200
    torch.testing.assert_close(have_logprob_B, logprob_B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_told(wrong: float) -> None:
    logits_BV = draw(2, 70)
    logits_BV[1, 11] = wrong
    for token_B, logprob_B in race(logits_BV, [1.0, 1.0], True):
        assert logprob_B.isfinite().tolist() == [True, False]
        assert (token_B >= 0).all()
        assert (token_B < 70).all()


def test_rows_of_a_wider_tensor() -> None:
    wide = draw(5, 200)
    (want, _), (have, _) = race(wide[:, 20:150], [1.0] * 5, True)
    assert torch.equal(have, want)
