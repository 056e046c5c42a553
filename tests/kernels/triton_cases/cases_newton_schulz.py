"""Newton-Schulz: kernel against reference."""

import pytest
import torch

from deepwright_kernels import dispatch
from deepwright_kernels.newton_schulz.triton import symmetric_product

from .sides import DEVICE, draw

# The interpreter makes its products in float32; on a GPU they are of bfloat16.
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
LOOSE = {"rtol": 1e-4, "atol": 1e-4} if DEVICE == "cpu" else {"rtol": 0.05, "atol": 0.05}


@pytest.mark.parametrize("shape", [(2, 40, 24), (3, 16, 33), (1, 1, 5), (1, 17, 17), (0, 4, 4)])
def test_a_symmetric_product_writes_both_halves(shape: tuple[int, int, int]) -> None:
    a_EMN = draw(*shape, dtype=DTYPE)
    have_EMM = symmetric_product(a_EMN, 0.5, None)
    torch.testing.assert_close(have_EMM.float(), 0.5 * a_EMN.float() @ a_EMN.float().mT, **LOOSE)
    assert torch.equal(have_EMM, have_EMM.mT)
    gram_EMM = have_EMM / max(1.0, shape[-1])
    want_EMM = 2.0 * gram_EMM.float() @ gram_EMM.float() - 3.0 * gram_EMM.float()
    torch.testing.assert_close(symmetric_product(gram_EMM, 2.0, -3.0).float(), want_EMM, **LOOSE)


@pytest.mark.parametrize("shape", [(2, 20, 33), (2, 33, 20), (1, 1, 1)])
def test_newton_schulz(shape: tuple[int, int, int]) -> None:
    matrices_EMN = draw(*shape, dtype=DTYPE) * 100
    want, have = (dispatch.load("newton_schulz", backend)(matrices_EMN, 5) for backend in ("reference", "triton"))
    assert have.dtype == DTYPE
    torch.testing.assert_close(have, want, **LOOSE)


def test_a_matrix_of_zeros_stays_one_and_disturbs_no_other() -> None:
    matrices_EMN = draw(2, 18, 9, dtype=DTYPE)
    matrices_EMN[0] = 0.0
    have = dispatch.load("newton_schulz", "triton")(matrices_EMN, 3)
    assert torch.equal(have[0], torch.zeros_like(have[0]))
    torch.testing.assert_close(have[1:], dispatch.load("newton_schulz", "reference")(matrices_EMN[1:], 3), **LOOSE)


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 6, 4)])
def test_keeps_torchs_rules(shape: tuple[int, int, int]) -> None:
    operator = torch.ops.deepwright.newton_schulz.default
    torch.library.opcheck(operator, (draw(*shape, dtype=DTYPE), 2), test_utils=("test_schema", "test_faketensor"))
