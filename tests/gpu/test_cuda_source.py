"""Compiling and starting CUDA kernels: arguments arrive, tiles come through the copy engine, errors are sentences."""

from pathlib import Path

import pytest
import torch

from deepwright_kernels.cuda_source import CudaError, TensorMap, compile_source, kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU; there is none here",
    ),
]
SOURCE = Path(__file__).with_name("tile_copy.cu")


@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 8), (60, 24)])
def test_a_tile_and_every_kind_of_argument_arrive(row: int, column: int) -> None:
    source = torch.randn(64, 40, device="cuda")
    out = torch.empty(16, 32, device="cuda")
    copy = kernel(SOURCE, "tile_copy", {"ROWS": 16, "COLUMNS": 32, "OFFSET": 3}, 64 * 1024, source.device)
    copy.launch((1, 1, 1), (128, 1, 1), TensorMap(source, (16, 32), swizzle=0), out, row, column, 0.5)
    want = torch.zeros(16, 32, device="cuda")  # zeros outside the tensor
    inside = source[row : row + 16, column : column + 32]
    want[: inside.shape[0], : inside.shape[1]] = inside
    assert torch.equal(out, want + 1.5)


def test_a_kernel_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = compile_source(SOURCE.read_text(), {"ROWS": 8, "COLUMNS": 32, "OFFSET": 0})
    (kept,) = (tmp_path / "deepwright" / "kernels").iterdir()
    assert kept.read_bytes() == code
    kept.write_bytes(b"from the disk")
    assert compile_source(SOURCE.read_text(), {"ROWS": 8, "COLUMNS": 32, "OFFSET": 0}) == b"from the disk"


def test_the_compilers_words_are_passed_on() -> None:
    with pytest.raises(CudaError, match='identifier "UNKNOWN" is undefined'):
        compile_source('extern "C" __global__ void f(int* x) { x[0] = UNKNOWN; }', {})


def test_a_tensor_that_the_copy_engine_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match="its last must be 1 and the others multiples of 16 bytes"):
        TensorMap(torch.empty(8, 6, device="cuda")[:, 1:], (8, 4))
