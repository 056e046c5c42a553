"""Every case runs with triton where an operator has it, and starts from the same seed."""

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepwright_kernels import backend_for, configure
from deepwright_kernels.dispatch import interpreted

from .sides import DEVICE


@pytest.fixture(scope="session", autouse=True)
def _looked_up_once() -> Iterator[None]:
    """At every call of every function the interpreter goes through all names of triton's language for those that are
    built in, which is a third of its time. They are the same each time, so their names are remembered."""
    if not interpreted():
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    built_in: dict[Any, list[str]] = {}

    def members(owner: Any) -> list[tuple[str, Any]]:
        if owner not in built_in:
            built_in[owner] = [name for name, member in inspect.getmembers(owner) if is_builtin(member)]
        return [(name, getattr(owner, name)) for name in built_in[owner]]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": members})
    yield
    interpreter.inspect = inspect


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    torch.manual_seed(0)
    with configure({"*": "triton"}):
        assert backend_for("rms_norm", torch.zeros(1, device=DEVICE)) == "triton"
        yield
