"""Sentences about wrong tensors: what every operator asks of its arguments before it starts.

The checks look at shapes, dtypes and devices only, never at values: reading a value would make the host wait for the
device. They raise `ValueError` (`TypeError` for a dtype) and name the argument, what it is and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def shape_of(tensor: Tensor) -> str:
    """The shape as people write it: [2, 3]."""
    return str(list(tensor.shape))


def require(condition: bool, operator: str, argument: str, problem: str) -> None:
    """Raise a sentence unless `condition` holds."""
    if not condition:
        raise ValueError(f"{operator}: {argument} {problem}.")


def require_shape(operator: str, argument: str, tensor: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """`expected` has None where any size will do; `meaning` names the dimensions, such as "[tokens, hidden]"."""
    # A loop, for a generator costs the host more than the rest of this; a decoding step comes by here 200 times.
    shape = tensor.shape
    fits = len(shape) == len(expected)
    for have, want in zip(shape, expected, strict=False):
        if want is not None and have != want:
            fits = False
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{operator}: {argument} has shape {shape_of(tensor)}; expected {meaning} = [{wanted}].")


def require_dtype(operator: str, argument: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Refuse a dtype that the operator does not take."""
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        have = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{operator}: {argument} is {have}; expected one of {names}.")


def require_device(operator: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    """Refuse a tensor that lies elsewhere than the first argument."""
    if tensor.device != device:
        raise ValueError(
            f"{operator}: {argument} is on {tensor.device}, but the first argument is on {device}; move one of them."
        )


def in_autocast_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as torch's own matrix products would take them: in autocast's dtype where autocast is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


class AskedOnce:
    """An operator's checks, made once for arguments that look the same: a decoding step repeats itself for hours, and
    twenty comparisons cost the host as much as a small kernel runs.

    `check` looks at shapes, strides, dtypes, devices, where a tensor begins and whether it wants a gradient, as all of
    this module does, and at numbers; so what has passed once passes again.
    """

    MOST = 4096

    def __init__(self, check: Callable[..., None]) -> None:
        self._check = check
        self._passed: set[tuple[Any, ...]] = set()

    def __call__(self, *arguments: Any) -> None:
        if torch.compiler.is_compiling() or type(arguments[0]) is not Tensor:  # sizes that are symbols
            self._check(*arguments)
            return
        look = (torch.is_grad_enabled(), *map(_look, arguments))
        if look not in self._passed:
            self._check(*arguments)
            if len(self._passed) >= self.MOST:
                self._passed.clear()
            self._passed.add(look)


def _look(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return (
        argument.shape,
        argument.stride(),
        argument.storage_offset(),
        argument.dtype,
        argument.device,
        argument.requires_grad,
    )
