"""Every case runs with triton where an operator has it, and starts from the same seed."""

from collections.abc import Iterator

import pytest
import torch

from deepwright_kernels import backend_for, configure

from .sides import DEVICE


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.manual_seed(0)
    with configure({"*": "triton"}):
        assert backend_for("rms_norm", torch.zeros(1, device=DEVICE)) == "triton"
        yield
