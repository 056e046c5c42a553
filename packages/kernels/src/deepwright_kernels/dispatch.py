"""The one place that decides which implementation of an operator runs.

Each operator names its backends: `reference` is the specification in plain torch, `triton` a kernel, `torch` a fast
path made of torch's own operations. `auto` takes the first that can run, in the operator's order for the tensor's
kind of device. A backend that was asked for and cannot run is replaced by the next best, and that is said once, as a
warning. Implementations are imported when they are first used, so a machine without triton never looks for it.

The choice belongs to the process, not to a thread: autograd's own threads must see what the main thread chose.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

AUTO = "auto"
REFERENCE = "reference"
BUILT_IN = (AUTO, REFERENCE, "triton", "torch")


@dataclass
class Operator:
    """An operator's backends (name -> "module:function") and its order of preference on CUDA and elsewhere."""

    name: str
    backends: dict[str, str | Callable[..., Any]]
    cuda: tuple[str, ...]
    elsewhere: tuple[str, ...]
    available: dict[str, Callable[[Tensor], str | None]] = field(default_factory=dict)


class BackendWarning(UserWarning):
    """A backend that was chosen cannot run here, and another one took its place."""


_operators: dict[str, Operator] = {}
_choices: dict[str, str] = {}
_functions: dict[str, dict[str, Callable[..., Any]]] = {backend: {} for backend in BUILT_IN}
_warned: set[tuple[str, str, str]] = set()


def operator(
    name: str,
    backends: Mapping[str, str],
    *,
    cuda: tuple[str, ...] = ("triton", REFERENCE),
    elsewhere: tuple[str, ...] = (REFERENCE,),
) -> None:
    """Declare an operator."""
    _operators[name] = Operator(name, dict(backends), cuda, elsewhere)


def add_backend(
    name: str,
    backend: str,
    implementation: Callable[..., Any],
    available: Callable[[Tensor], str | None] = lambda tensor: None,
) -> None:
    """Add a backend to an operator (another vendor's kernel, say). `configure` can then choose it.

    `implementation` has the signature of the operator's reference. `available(tensor)` returns None where it can run
    on the tensor's device, else the reason why not. `auto` never takes an added backend: installing changes nothing.
    """
    declared = _known(name)
    if backend in BUILT_IN or backend in declared.backends:
        raise ValueError(f"{name} already has a backend called '{backend}'; choose another name.")
    declared.backends[backend] = implementation
    declared.available[backend] = available


def operators() -> dict[str, list[str]]:
    """Every operator's backends, sorted."""
    return {name: sorted(declared.backends) for name, declared in sorted(_operators.items())}


class configure:
    """Choose backends per operator: `configure({"rms_norm": "triton"})`; "*" stands for every operator.

    Holds from now on; as a context manager (`with configure(...):`) only inside.
    """

    def __init__(self, choices: Mapping[str, str]) -> None:
        expanded: dict[str, str] = {}
        for name, backend in choices.items():
            if name == "*":
                if backend not in BUILT_IN:
                    raise ValueError(f"Backend '{backend}' for every operator: expected one of {', '.join(BUILT_IN)}.")
                expanded |= {
                    every: backend
                    for every, declared in _operators.items()
                    if backend == AUTO or backend in declared.backends
                }
                continue
            known = sorted({AUTO, *_known(name).backends})
            if backend not in known:
                raise ValueError(f"{name} has no backend '{backend}'; expected one of {', '.join(known)}.")
            expanded[name] = backend
        self._before = dict(_choices)
        _choices.update(expanded)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choices.clear()
        _choices.update(self._before)


def choices() -> dict[str, str]:
    """What is configured for each operator (`auto` unless something else was chosen)."""
    return {name: _choices.get(name, AUTO) for name in sorted(_operators)}


def backend_for(name: str, tensor: Tensor) -> str:
    """The backend that `name` would use for a tensor on this tensor's device."""
    declared = _known(name)
    chosen = _choices.get(name, AUTO)
    order = declared.cuda if tensor.device.type == "cuda" else declared.elsewhere
    for candidate in order if chosen == AUTO else (chosen, *order):
        reason = _why_not(declared, candidate, tensor)
        if reason is None:
            return candidate
        _say_once(name, candidate, reason)
    return REFERENCE


def implementation(name: str, tensor: Tensor) -> Callable[..., Any]:
    """The function to call for a tensor on this tensor's device."""
    return load(name, backend_for(name, tensor))


def load(name: str, backend: str) -> Callable[..., Any]:
    """One backend's function, whether it can run here or not."""
    declared = _known(name)
    if backend not in declared.backends:
        raise ValueError(f"{name} has no backend '{backend}'; expected one of {', '.join(sorted(declared.backends))}.")
    where = declared.backends[backend]
    if not isinstance(where, str):
        return where
    _import_backend(backend)
    return _functions[backend][name]


@torch.compiler.assume_constant_result  # torch.compile must not trace imports
def _import_backend(backend: str) -> bool:
    """Import this backend of every operator, at once: a graph that is being traced sees the table complete."""
    functions = _functions.setdefault(backend, {})
    for name, declared in _operators.items():
        where = declared.backends.get(backend)
        if isinstance(where, str) and name not in functions:
            module, function = where.split(":")
            functions[name] = getattr(import_module(module), function)
    return True


@torch.compiler.assume_constant_result
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether triton kernels run in its interpreter, on tensors of the CPU. Decided before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not(declared: Operator, backend: str, tensor: Tensor) -> str | None:
    if backend in declared.available:
        return declared.available[backend](tensor)
    if backend != "triton":
        return None
    if not _triton_installed():
        return "triton is not installed"
    if tensor.dtype == torch.float64:
        return "its kernels compute in float32 and the tensor is float64"
    if tensor.device.type != "cuda" and not interpreted():
        return f"the tensor is on {tensor.device.type}, where triton only runs with TRITON_INTERPRET=1"
    return None


def _say_once(name: str, backend: str, reason: str) -> None:
    if (name, backend, reason) not in _warned:
        _warned.add((name, backend, reason))
        warnings.warn(
            f"{name}: the backend '{backend}' cannot run because {reason}; another one is used instead.",
            BackendWarning,
            stacklevel=4,
        )


def _known(name: str) -> Operator:
    if name not in _operators:
        near = difflib.get_close_matches(name, _operators, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"There is no operator '{name}'.{hint} Known: {', '.join(sorted(_operators))}.")
    return _operators[name]
