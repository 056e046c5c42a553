"""Drawing tokens: the kernel, which looks for distances, against the reference, which sorts."""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import dispatch

from .sides import DEVICE

# temperature, top_p, min_p, top_k
SETTINGS = [
    (0.0, 0.5, 0.4, 3),
    (1.0, 1.0, 0.0, 0),
    (0.4, 0.9, 0.0, 0),
    (1.7, 1.0, 0.0, 5),
    (1.0, 0.7, 0.02, 40),
    (30.0, 0.99, 0.0, 10_000),
    (1.0, 1e-6, 0.0, 0),
    (1.0, 1.0, 0.3, 0),
    (1.3, 0.5, 1.0, 1),
    (2.0, 0.8, 0.0, 3),
]
ROWS = len(SETTINGS)


def columns() -> list[Tensor]:
    """Temperatures and truncations, seeds and positions."""
    numbers = torch.arange(ROWS, device=DEVICE)
    settings = [torch.tensor(column, device=DEVICE) for column in zip(*SETTINGS, strict=True)]
    return [*settings, numbers * 7919 - 99, numbers**3 + 2**33]


@pytest.mark.parametrize(("vocabulary", "decimals"), [(1, 0), (5, 0), (70, 6), (301, 0)])
@pytest.mark.parametrize(("random", "truncated"), [(False, False), (True, False), (True, True)])
def test_tokens_and_log_probabilities(vocabulary: int, decimals: int, random: bool, truncated: bool) -> None:
    torch.manual_seed(vocabulary)
    logits_BV = (torch.randn(ROWS, vocabulary, device=DEVICE) * 2).round(decimals=decimals)  # with ties, and without
    logits_BV[::7, vocabulary // 2 :] = -torch.inf
    if vocabulary > 1:
        logits_BV[3] = -torch.inf
        logits_BV[3, 1] = 4.0
    else:
        logits_BV[:] = 1.5
    arguments = (logits_BV, *columns(), random, truncated)
    want, have = (dispatch.load("draw_tokens", backend)(*arguments) for backend in ("reference", "triton"))
    assert have[0].tolist() == want[0].tolist()
    torch.testing.assert_close(have[1], want[1], atol=1e-5, rtol=1e-5)


def test_the_tail_of_a_wide_vocabulary_and_rows_that_lie_apart() -> None:
    torch.manual_seed(0)
    logits_BV = torch.randn(2, 18_000, device=DEVICE)[:, :17_001]
    rows = [column[2:4] for column in columns()]
    rows[1][:] = 0.97
    want, have = (
        dispatch.load("draw_tokens", backend)(logits_BV, *rows, True, True) for backend in ("reference", "triton")
    )
    assert have[0].tolist() == want[0].tolist()
    torch.testing.assert_close(have[1], want[1], atol=1e-5, rtol=1e-5)


def test_logits_that_are_not_numbers() -> None:
    logits_BV = torch.randn(4, 9, device=DEVICE)
    logits_BV[0, 3], logits_BV[1, 8], logits_BV[2] = torch.nan, torch.inf, -torch.inf
    rows = [column[4:8] for column in columns()]
    for flags in ((False, False), (True, False), (True, True)):
        tokens, logprobs = dispatch.load("draw_tokens", "triton")(logits_BV, *rows, *flags)
        assert logprobs.isfinite().tolist() == [False, False, False, True]
        assert ((tokens >= 0) & (tokens < 9)).all()


def test_equal_logits_logits_that_cannot_be_drawn_and_half_precision() -> None:
    logits_BV = torch.zeros(4, 4500, device=DEVICE)
    logits_BV[1:, 2:] = -torch.inf
    logits_BV[3, :2] = -torch.inf
    logits_BV[3, 4200] = 1.0
    rows = [column[:4] for column in columns()]
    rows[0] = torch.tensor([0.0, 0.0, 1.0, 1.0], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (logits_BV.to(dtype), *rows, True, False)
        want, have = (dispatch.load("draw_tokens", backend)(*arguments) for backend in ("reference", "triton"))
        assert have[0].tolist() == want[0].tolist()
        assert have[0].tolist()[:2] == [0, 0]
        assert have[0][2] < 2
        assert have[0][3] == 4200
        torch.testing.assert_close(have[1], want[1], atol=1e-6, rtol=1e-5)
