"""An operation called at once and through torch's registry: the same values and gradients, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_kernels.operation import Operation

calls = []


def _scale(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    calls.append(type(x))
    return x * factor, torch.arange(x.shape[0])


scale = Operation("test_scale", _scale)


@scale.shapes
def _(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.int64)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _x, ctx.factor = inputs


scale.gradients(lambda ctx, grad, _grad_indices: (grad * ctx.factor, None), _keep)


def test_values_and_gradients_at_once_and_compiled() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    for call in (scale, torch.compile(lambda x, f: scale(x, f), fullgraph=True, backend="aot_eager")):
        y, indices = call(x, 3.0)
        torch.testing.assert_close(y, 3 * x)
        assert indices.tolist() == [0, 1, 2] and not indices.requires_grad
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, torch.full_like(x, 3.0))
    with torch.no_grad():
        assert not scale(x, 2.0)[0].requires_grad


def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad((scale(x, 2.0)[0] ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_fake_tensor_goes_through_the_registry() -> None:
    calls.clear()
    with torch._subclasses.FakeTensorMode():
        y, indices = scale(torch.empty(4, 5), 2.0)
    assert y.shape == (4, 5) and indices.dtype == torch.int64
    assert calls == []
