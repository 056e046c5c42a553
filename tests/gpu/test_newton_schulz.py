"""Newton-Schulz on a GPU: odd and real shapes in bfloat16 against float32, and the dispatch's choice."""

import pytest
import torch

from deepwright_kernels import backend_for, dispatch, newton_schulz

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]


@pytest.mark.parametrize("shape", [(3, 704, 520), (2, 520, 1032), (1, 2048, 2048), (2, 2816, 2048), (5, 64, 96)])
def test_near_the_same_in_float32(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices_EMN = torch.randn(shape, device="cuda").bfloat16()
    have_EMN = dispatch.load("newton_schulz", "triton")(matrices_EMN, 5)
    want_EMN = dispatch.load("newton_schulz", "reference")(matrices_EMN.double(), 5)
    assert have_EMN.dtype == torch.bfloat16 and have_EMN.shape == shape
    assert (have_EMN.double() - want_EMN).norm() / want_EMN.norm() < 0.03


def test_large_matrices_take_the_kernel_and_small_or_exact_ones_torch() -> None:
    def chosen(shape: tuple[int, int, int], dtype: torch.dtype) -> str:
        return backend_for("newton_schulz", torch.zeros(shape, device="cuda", dtype=dtype), 5)

    assert chosen((2, 2048, 1024), torch.bfloat16) == "triton"
    assert chosen((2, 2048, 1024), torch.float32) == "torch"
    assert chosen((8, 64, 64), torch.bfloat16) == "torch"
    assert chosen((2, 1001, 1024), torch.bfloat16) == "torch"
    assert torch.equal(
        newton_schulz(torch.zeros(1, 600, 600, device="cuda").bfloat16()),
        torch.zeros(1, 600, 600, device="cuda").bfloat16(),
    )
