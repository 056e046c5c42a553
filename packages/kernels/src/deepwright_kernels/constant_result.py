"""Functions whose results torch.compile takes as constants, marked without importing the compiler.

`torch.compiler.assume_constant_result` imports torch's tracer to set one attribute: a second of every command's start,
and 147 MB, for programs that mostly compile nothing. The tracer finds the mark just the same when it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def constant_result(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Mark (a decorator): a graph being traced calls `function` once and keeps what it returned, a bool, a number or a
    string. What the function does inside, imports above all, is not traced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
