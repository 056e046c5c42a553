"""The text of CUDA kernels, which is put together on any machine."""

from pathlib import Path

import pytest

import deepwright_kernels
from deepwright_kernels.cuda_source import source_of

PACKAGE = Path(deepwright_kernels.__file__).parent
KERNELS = sorted(PACKAGE.rglob("*.cu"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_kernels_need_no_header_of_others(path: Path) -> None:
    text = source_of(path)
    assert "#include" not in [line.split(maxsplit=1)[0] for line in text.splitlines() if line.strip()]
    assert 'extern "C" __global__' in text


def test_what_is_included_stands_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "kernel.cu"
    path.write_text('// before\n#include "wgmma.cuh"\n// after\n')
    assert source_of(path) == "// before\n" + (PACKAGE / "wgmma.cuh").read_text() + "// after\n"
