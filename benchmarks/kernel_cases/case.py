"""A row of the table: the same work done by our operator and by its peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import deepwright_kernels as kernels
from deepwright_kernels import dispatch

Run = Callable[[], Any]
BYTES, FLOPS, FP8_FLOPS = "TB/s", "TFLOP/s", "TFLOP/s fp8"


@dataclass(frozen=True)
class Case:
    """runs: implementation -> what to time; "ours" is what `auto` picks, `backend` its name.

    amount: bytes that have to move (each input read once, each output written once), or operations that have to be
    made, whatever an implementation really does. unit: which ceiling to compare with, `BYTES`, `FLOPS` (of products
    in the dtype of the run) or `FP8_FLOPS`.
    """

    operator: str
    shape: str
    runs: dict[str, Run]
    amount: float
    unit: str
    backend: str


@dataclass(frozen=True)
class Settings:
    """device: "cuda" or "cpu". dtype: of the products. compiled: whether torch.compile is a peer."""

    device: str
    dtype: torch.dtype
    compiled: bool

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"


def implementations(operator: str, settings: Settings, **peers: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Implementation -> function: ours, the plain reference ("eager") and the reference under torch.compile."""
    reference = dispatch.load(operator, "reference")
    found: dict[str, Callable[..., Any]] = {"ours": getattr(kernels, operator), "eager": reference}
    if settings.compiled:
        found["compile"] = compiled(reference)
    return found | peers


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Under torch.compile for the very shapes of each call: as fast as it gets, and the same code in every process."""
    return torch.compile(function, dynamic=False)


def applied(functions: dict[str, Callable[..., Any]], *arguments: Any) -> dict[str, Run]:
    """Each function with these arguments."""
    return {name: (lambda function=function: function(*arguments)) for name, function in functions.items()}


def with_gradients(
    functions: dict[str, Callable[..., Any]], leaves: list[Tensor], upstream: Tensor, *arguments: Any
) -> dict[str, Run]:
    """Each function with these arguments, forward and backward; of several results the first is differentiated."""

    def run(function: Callable[..., Any]) -> None:
        result = function(*arguments)
        torch.autograd.grad(result if isinstance(result, Tensor) else result[0], leaves, upstream)

    return {name: (lambda function=function: run(function)) for name, function in functions.items()}


def installed(module: str) -> ModuleType | None:
    """A peer's module, if it is here and can be imported."""
    try:
        return importlib.import_module(module)
    except Exception:  # a peer built for another machine fails in ways of its own
        return None
