"""Results that do not depend on company: every row of every product and every sequence of every attention is computed
as if it were alone, to the last bit, whatever number of others shares the call and wherever in it they stand.

    with row_by_row():
        hidden = model.extend(...)

Floating-point addition is not associative, and fast libraries choose tiles, splits and orders of summation by the
number of rows (see He & Thinking Machines 2025, "Defeating nondeterminism in LLM inference"). Inside this context
operators of this package take forms whose order of summation hangs on nothing but the row itself, and so do torch's
matrix products and, on a CPU, exponentials (whose vectorised loops end in scalar ones that round differently). Calls of
torch that are known to do otherwise and have no such form are refused. Holds for the calling thread only.

What it costs: products have one tile whatever the number of rows, no sum is split over processors, and attention walks
over a context in one order. Left out: gradients, FP8, and torch functions that nobody here calls between rows of a
batch (norms over the batch, say).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .. import dispatch
from . import elementwise, operators, products

Replacements = dict[Any, Callable[..., Any]]

PRODUCTS: Replacements = {
    functional.linear: products.linear,
    torch.matmul: products.matmul,
    Tensor.matmul: products.matmul,
    Tensor.__matmul__: products.matmul,
    torch.mm: products.matmul,
    Tensor.mm: products.matmul,
    torch.bmm: products.matmul,
    Tensor.bmm: products.matmul,
}
# On a GPU each element is computed by itself already.
ELEMENTWISE: Replacements = {
    torch.exp: elementwise.exp,
    Tensor.exp: elementwise.exp,
    torch.log: elementwise.log,
    Tensor.log: elementwise.log,
    torch.sigmoid: elementwise.sigmoid,
    Tensor.sigmoid: elementwise.sigmoid,
    functional.silu: elementwise.silu,
}
REFUSED = (
    functional.scaled_dot_product_attention,
    torch.einsum,
    torch.addmm,
    torch.baddbmm,
    functional.grouped_mm,
)


class _RowByRow(TorchFunctionMode):
    """Sees every call of a torch function that this thread makes in Python."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        instead = PRODUCTS.get(func)
        if instead is None and args and isinstance(args[0], Tensor) and not args[0].is_cuda:
            instead = ELEMENTWISE.get(func)
        if instead is not None:
            return instead(*args, **kwargs)
        if func in REFUSED:
            name = getattr(func, "__name__", str(func))
            raise NotImplementedError(
                f"torch's {name} was called, whose results depend on what shares the call; expected the operators of "
                "deepwright_kernels, torch.matmul or a linear layer, which have a form for each row by itself."
            )
        return func(*args, **kwargs)


@contextmanager
def row_by_row() -> Iterator[None]:
    """Within this, results of this thread do not depend on company. May be nested."""
    if is_row_by_row():
        yield
        return
    dispatch.put_instead(operators.run)
    try:
        with _RowByRow():
            yield
    finally:
        dispatch.put_instead(None)


def is_row_by_row() -> bool:
    """Whether this thread is inside `row_by_row`. Where there are two forms of one function, take one for all."""
    return dispatch.instead() is not None
