"""The one place that decides which implementation of an operator runs.

Each operator names its backends: `reference` is the specification in plain torch, `triton` a portable kernel, `torch`
a fast path made of torch's own operations, `cuda` a kernel for one generation of GPU, compiled when it is first used.
`auto` takes the first that can run, in the operator's order for the tensor's kind of device; an operator whose fastest
backend depends on sizes gives a function of its arguments as that order. When the first of the order cannot run, that
is said once, as a warning. A backend that was chosen for an operator by name runs or is refused with the reason; one
that was chosen for every operator ("*") is a wish, and gives way like `auto`'s.

Implementations are imported when they are first used, so a machine without triton never looks for it. The choice
belongs to the process, not to a thread: autograd's own threads must see what the main thread chose.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .constant_result import constant_result

AUTO = "auto"
REFERENCE = "reference"
BUILT_IN = (AUTO, REFERENCE, "triton", "torch", "cuda")

Order = tuple[str, ...] | Callable[..., tuple[str, ...]]
Needs = Callable[..., str | None]


@dataclass
class Operator:
    """An operator's backends (name -> "module:function"), its order of preference on CUDA and elsewhere (a function of
    the operator's arguments where sizes decide), and what a backend needs of the arguments beyond its device: a
    function of them that returns None or why it cannot take them."""

    name: str
    backends: dict[str, str | Callable[..., Any]]
    cuda: Order
    elsewhere: Order
    needs: dict[str, Needs]
    available: dict[str, Callable[[Tensor], str | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """A configured backend. `wish`: asked for all operators at once, so it gives way where it cannot run."""

    backend: str
    wish: bool


BY_ITSELF = Choice(AUTO, wish=True)


class BackendWarning(UserWarning):
    """The backend that would have been taken cannot run here, and another one took its place."""


_operators: dict[str, Operator] = {}
_choices: dict[str, Choice] = {}
_functions: dict[str, dict[str, Callable[..., Any]]] = {backend: {} for backend in BUILT_IN}
_imported: dict[str, int] = {}  # backend -> how many operators there were when it was imported
_warned: set[tuple[str, str, str]] = set()
_any_chosen = False  # whether some operator has another backend than `auto`'s
# Asked before every call of an operator, and answered slowly.
_found: dict[str, bool] = {}
_capabilities: dict[int, tuple[int, int]] = {}


def operator(
    name: str,
    backends: Mapping[str, str],
    *,
    cuda: Order = ("triton", REFERENCE),
    elsewhere: Order = (REFERENCE,),
    needs: Mapping[str, Needs] | None = None,
) -> None:
    """Declare an operator."""
    _operators[name] = Operator(name, dict(backends), cuda, elsewhere, dict(needs or {}))


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

    A named operator's backend must be able to run; a backend for "*" runs where it can. Holds from now on; as a
    context manager (`with configure(...):`) only inside.
    """

    def __init__(self, choices: Mapping[str, str]) -> None:
        chosen = expand(choices)
        self._before = dict(_choices)
        _choices.update(chosen)
        _note_choices()

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _choices.clear()
        _choices.update(self._before)
        _note_choices()


def _note_choices() -> None:
    global _any_chosen
    _any_chosen = any(choice.backend != AUTO for choice in _choices.values())


def expand(choices: Mapping[str, str]) -> dict[str, Choice]:
    """The choices operator by operator; `ValueError` for an unknown operator or backend."""
    chosen: dict[str, Choice] = {}
    everywhere = choices.get("*")
    if everywhere is not None:
        if everywhere not in BUILT_IN:
            raise ValueError(f"Backend '{everywhere}' for every operator: expected one of {', '.join(BUILT_IN)}.")
        chosen = {
            name: Choice(everywhere, wish=True)
            for name, declared in _operators.items()
            if everywhere == AUTO or everywhere in declared.backends
        }
    for name, backend in choices.items():
        if name == "*":
            continue
        known = sorted({AUTO, *_known(name).backends})
        if backend not in known:
            raise ValueError(f"{name} has no backend '{backend}'; expected one of {', '.join(known)}.")
        chosen[name] = Choice(backend, wish=False)
    return chosen


def choices() -> dict[str, str]:
    """What is configured for each operator (`auto` unless something else was chosen)."""
    return {name: _choices[name].backend if name in _choices else AUTO for name in sorted(_operators)}


def backend_for(name: str, *arguments: Any) -> str:
    """The backend that `name` would use for these arguments, of which the first is a tensor.

    One tensor alone stands for its device and dtype: then what backends need of the other arguments is not asked.
    `ValueError` where a backend was chosen for this operator by name and cannot run.
    """
    declared, tensor = _known(name), arguments[0]
    chosen = _choices.get(name, BY_ITSELF)
    if chosen.backend != AUTO:
        reason = _why_not(declared, chosen.backend, arguments)
        if reason is None:
            return chosen.backend
        if not chosen.wish:
            raise ValueError(
                f"{name}: the backend '{chosen.backend}' was chosen and cannot run because {reason}. "
                f"Choose another one, or '{AUTO}'."
            )
        _say_once(name, chosen.backend, reason)
    order = declared.cuda if tensor.device.type == "cuda" else declared.elsewhere
    for candidate in order(*arguments) if callable(order) else order:
        reason = _why_not(declared, candidate, arguments)
        if reason is None:
            return candidate
        _say_once(name, candidate, reason)
    return REFERENCE


def reasons(name: str, *arguments: Any) -> dict[str, str | None]:
    """Each backend with None where it can run for these arguments, else why it cannot. Arguments as `backend_for`."""
    declared = _known(name)
    return {backend: _why_not(declared, backend, arguments) for backend in sorted(declared.backends)}


def depends_on_arguments(name: str, device: torch.device) -> bool:
    """Whether sizes, and not only the device, decide what `auto` takes."""
    declared = _known(name)
    return callable(declared.cuda if device.type == "cuda" else declared.elsewhere)


class _OfThread(threading.local):
    instead: Callable[[str, tuple[Any, ...]], Any] | None = None


_of_thread = _OfThread()


def instead() -> Callable[[str, tuple[Any, ...]], Any] | None:
    """What runs in this thread in place of every operator's backends, if anything does."""
    return _of_thread.instead


def put_instead(function: Callable[[str, tuple[Any, ...]], Any] | None) -> None:
    """From now on in this thread, `run` hands every operator's name and arguments to `function` (None: to nobody)."""
    _of_thread.instead = function


def by_itself() -> bool:
    """Whether every operator takes the backend that `auto` takes: none was chosen and, in this thread, nothing is put
    instead. A layer's form that goes past the operators must ask."""
    return not _any_chosen and _of_thread.instead is None


def run(name: str, *arguments: Any) -> Any:
    """Call the operator's backend for these arguments, of which the first is a tensor, with all of them."""
    if _of_thread.instead is not None:
        return _of_thread.instead(name, arguments)
    return load(name, backend_for(name, *arguments))(*arguments)


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


@constant_result  # torch.compile must not trace imports
def _import_backend(backend: str) -> bool:
    """Import this backend of every operator, at once: a graph that is being traced sees the table complete."""
    if _imported.get(backend) == len(_operators):
        return True
    functions = _functions.setdefault(backend, {})
    for name, declared in _operators.items():
        where = declared.backends.get(backend)
        if isinstance(where, str) and name not in functions:
            module, function = where.split(":")
            functions[name] = getattr(import_module(module), function)
    _imported[backend] = len(_operators)
    return True


@constant_result
def _installed(module: str) -> bool:
    if module not in _found:
        _found[module] = importlib.util.find_spec(module) is not None
    return _found[module]


@constant_result
def capability(index: int) -> tuple[int, int]:
    """The compute capability of a CUDA device, a constant for torch.compile."""
    if index not in _capabilities:
        _capabilities[index] = torch.cuda.get_device_capability(index)
    return _capabilities[index]


def interpreted() -> bool:
    """Whether triton kernels run in its interpreter, on tensors of the CPU. Decided before triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not(declared: Operator, backend: str, arguments: tuple[Any, ...]) -> str | None:
    tensor = arguments[0]
    if backend in declared.available:
        return declared.available[backend](tensor)
    reason = None
    if backend == "triton":
        reason = _why_not_triton(tensor)
    elif backend == "cuda":
        reason = _why_not_cuda(tensor)
    if reason is None and backend in declared.needs and len(arguments) > 1:
        reason = declared.needs[backend](*arguments)
    return reason


def _why_not_triton(tensor: Tensor) -> str | None:
    if not _installed("triton"):
        return "triton is not installed"
    if tensor.dtype == torch.float64:
        return "its kernels compute in float32 and the tensor is float64"
    if tensor.device.type != "cuda" and not interpreted():
        return f"the tensor is on {tensor.device.type}, where triton only runs with TRITON_INTERPRET=1"
    return None


def _why_not_cuda(tensor: Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return f"the tensor is on {tensor.device.type}; its kernels are for Hopper GPUs (compute capability 9.0)"
    if torch.version.hip is not None:
        return "this is a ROCm build of torch; its kernels are for Hopper GPUs (compute capability 9.0)"
    if not (_installed("cuda") and _installed("cuda.bindings")):
        return "the package cuda-bindings is not installed, which compiles and starts its kernels"
    return _why_not_hopper(tensor.device.index or 0)


@constant_result  # torch.compile cannot compare the tuple that another constant function gives
def _why_not_hopper(index: int) -> str | None:
    present = capability(index)
    if present == (9, 0):
        return None
    return "the device has compute capability {}.{}; its kernels are for 9.0 (Hopper)".format(*present)


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
