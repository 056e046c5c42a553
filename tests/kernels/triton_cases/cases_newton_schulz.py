"""Newton-Schulz: kernel against reference."""

import pytest
import torch

from deepwright_kernels import dispatch
from deepwright_kernels.newton_schulz.triton import symmetric_product, update

from .sides import DEVICE, draw

# The interpreter makes its products in float32; on a GPU they are of bfloat16.
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
LOOSE = {"rtol": 1e-4, "atol": 1e-4} if DEVICE == "cpu" else {"rtol": 0.05, "atol": 0.05}


@pytest.mark.parametrize("shape", [(2, 40, 24), (3, 16, 40), (1, 8, 8)])
def test_a_symmetric_product_writes_both_halves(shape: tuple[int, int, int]) -> None:
    a_EMN = draw(*shape, dtype=DTYPE)
    side = min(shape[1:])
    gram_ESS, factor_ESS = (torch.full((shape[0], side, side), torch.nan, device=DEVICE, dtype=DTYPE) for _ in range(2))
    symmetric_product(a_EMN, 1 / side, None, gram_ESS)
    wide = a_EMN.float().mT if shape[1] > shape[2] else a_EMN.float()
    torch.testing.assert_close(gram_ESS.float(), wide @ wide.mT / side, **LOOSE)
    assert torch.equal(gram_ESS, gram_ESS.mT)
    symmetric_product(gram_ESS, 2.0, -3.0, factor_ESS)
    want_ESS = 2.0 * gram_ESS.float() @ gram_ESS.float() - 3.0 * gram_ESS.float()
    torch.testing.assert_close(factor_ESS.float(), want_ESS, **LOOSE)
    out_EMN = torch.full_like(a_EMN, torch.nan)
    update(gram_ESS, a_EMN, 0.5, out_EMN)
    x, f = a_EMN.float(), gram_ESS.float()
    torch.testing.assert_close(out_EMN.float(), 0.5 * x + (x @ f if shape[1] > shape[2] else f @ x), **LOOSE)


@pytest.mark.parametrize("shape", [(2, 24, 40), (2, 40, 24), (1, 8, 8), (0, 8, 8)])
def test_newton_schulz(shape: tuple[int, int, int]) -> None:
    matrices_EMN = draw(*shape, dtype=DTYPE) * 100
    want, have = (dispatch.load("newton_schulz", backend)(matrices_EMN, 2) for backend in ("reference", "triton"))
    assert have.dtype == DTYPE
    torch.testing.assert_close(have, want, **LOOSE)


def test_a_matrix_of_zeros_stays_one_and_disturbs_no_other() -> None:
    matrices_EMN = draw(2, 24, 8, dtype=DTYPE)
    matrices_EMN[0] = 0.0
    have = dispatch.load("newton_schulz", "triton")(matrices_EMN, 3)
    assert torch.equal(have[0], torch.zeros_like(have[0]))
    torch.testing.assert_close(have[1:], dispatch.load("newton_schulz", "reference")(matrices_EMN[1:], 3), **LOOSE)


@pytest.mark.parametrize("shape", [(2, 8, 16), (2, 16, 8)])
def test_keeps_torchs_rules(shape: tuple[int, int, int]) -> None:
    operator = torch.ops.deepwright.newton_schulz.default
    torch.library.opcheck(operator, (draw(*shape, dtype=DTYPE), 2), test_utils=("test_schema", "test_faketensor"))
