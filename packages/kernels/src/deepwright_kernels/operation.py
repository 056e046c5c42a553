"""A kernel as an operation of torch, and the short way to it where nothing is traced.

torch.compile, fake tensors and exported graphs need an operation in torch's registry. A call through the registry costs
the host about 20 µs, and 60 µs with a gradient to record; a kernel of a decoding step takes less. So where nothing is
traced, the implementation is called at once, under a plain autograd function if a gradient is asked for.

Leaves out operations that write into their arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN = (Tensor, torch.nn.Parameter)


class Operation:
    """`deepwright::<name>`; `implementation` has annotations, from which torch infers the schema."""

    def __init__(self, name: str, implementation: Callable[..., Any]) -> None:
        self._implementation = implementation
        self._registered = torch.library.custom_op(f"deepwright::{name}", implementation, mutates_args=())
        self._function: type[torch.autograd.Function] | None = None

    def shapes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Declare what the results look like, for tracing (a decorator)."""
        self._registered.register_fake(function)
        return function

    def gradients(self, backward: Callable[..., Any], keep: Callable[..., None]) -> None:
        """Declare the gradient: `keep(ctx, inputs, output)` saves, `backward(ctx, *gradients)` computes."""
        self._registered.register_autograd(backward, setup_context=keep)
        implementation = self._implementation

        class Function(torch.autograd.Function):
            # One method for both: torch looks up a signature in each call where setting up is apart from the forward.
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                output = implementation(*arguments)
                keep(ctx, arguments, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *gradients: Tensor) -> Any:
                return backward(ctx, *gradients)

        self._function = Function

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._registered(*arguments)
        differentiated = False
        for argument in arguments:
            if isinstance(argument, Tensor):
                if type(argument) not in PLAIN:
                    return self._registered(*arguments)
                differentiated |= argument.requires_grad
        if differentiated and torch.is_grad_enabled() and self._function is not None:
            return self._function.apply(*arguments)
        return self._implementation(*arguments)
