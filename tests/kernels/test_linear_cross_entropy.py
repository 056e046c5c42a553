"""The chunked loss against torch's own, against finite differences, and against its promise to hold no full logits."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepwright_kernels import dispatch, linear_cross_entropy, weighted_linear_cross_entropy

BACKENDS = ["reference", "torch"]


def sample(tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens + vocabulary)
    hidden_TD = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True)
    targets_T = torch.randint(vocabulary, (tokens,))
    targets_T[1::4] = -100
    return hidden_TD, weight_VD, targets_T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 3, 64, None])
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (13, 7), (20, 33), (0, 5)])
def test_loss_gradient_and_entropy_against_torch(backend: str, chunk: int | None, tokens: int, vocabulary: int) -> None:
    hidden_TD, weight_VD, targets_T = sample(tokens, 6, vocabulary)
    upstream_T = torch.randn(tokens, dtype=torch.float64)
    loss_T, entropy_T = dispatch.load("linear_cross_entropy", backend)(
        hidden_TD, weight_VD, targets_T, -100, chunk, 0.7
    )
    gradients = torch.autograd.grad((loss_T * upstream_T).sum(), (hidden_TD, weight_VD))

    logits_TV = hidden_TD @ weight_VD.T / 0.7
    expected_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none", ignore_index=-100)
    expected = torch.autograd.grad((expected_T * upstream_T).sum(), (hidden_TD, weight_VD))
    torch.testing.assert_close(loss_T, expected_T)
    for have, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(have, want)
    want_T = torch.distributions.Categorical(logits=logits_TV.detach()).entropy() if tokens else entropy_T
    torch.testing.assert_close(entropy_T, want_T.masked_fill(targets_T == -100, 0.0))
    assert not entropy_T.requires_grad


def test_gradients_by_finite_differences() -> None:
    hidden_TD, weight_VD, targets_T = sample(5, 3, 4)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, targets_T, chunk=2, temperature=1.3)[0], (hidden_TD, weight_VD)
    )


def test_only_the_gradient_that_is_asked_for() -> None:
    hidden_TD, weight_VD, targets_T = sample(6, 3, 5)
    (alone,) = torch.autograd.grad(
        linear_cross_entropy(hidden_TD.detach(), weight_VD, targets_T)[0].sum(), (weight_VD,)
    )
    (both, _) = torch.autograd.grad(
        linear_cross_entropy(hidden_TD, weight_VD, targets_T)[0].sum(), (weight_VD, hidden_TD)
    )
    torch.testing.assert_close(alone, both)


def test_everything_ignored_gives_zero_loss_and_zero_gradients() -> None:
    hidden_TD, weight_VD, targets_T = sample(6, 3, 5)
    loss_T, entropy_T = linear_cross_entropy(hidden_TD, weight_VD, torch.full_like(targets_T, -100))
    loss_T.sum().backward()
    assert not loss_T.any() and not entropy_T.any()
    assert not hidden_TD.grad.any() and not weight_VD.grad.any()


def test_huge_logits_stay_finite() -> None:
    hidden_TD, weight_VD, targets_T = sample(8, 4, 9, torch.float32)
    loss_T, entropy_T = linear_cross_entropy(hidden_TD * 1e4, weight_VD * 10, targets_T, chunk=3)
    loss_T.sum().backward()
    for tensor in (loss_T, entropy_T, hidden_TD.grad, weight_VD.grad):
        assert torch.isfinite(tensor).all()


def test_bfloat16_is_summed_in_float32() -> None:
    hidden_TD, weight_VD, targets_T = sample(64, 32, 128, torch.float32)
    weight_VD = (weight_VD.detach() * 0.1).requires_grad_()
    exact_T, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    exact = torch.autograd.grad(exact_T.sum(), (hidden_TD, weight_VD))
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden_TD, weight_VD)]
    loss_T, entropy_T = linear_cross_entropy(*narrow, targets_T, chunk=16)
    assert loss_T.dtype == entropy_T.dtype == torch.float32
    torch.testing.assert_close(loss_T, exact_T, rtol=0.02, atol=0.02)
    for have, want in zip(torch.autograd.grad(loss_T.sum(), narrow), exact, strict=True):
        assert (have.float() - want).norm() / want.norm() < 0.02


def test_autocast_is_followed_forwards_and_backwards() -> None:
    hidden_TD, weight_VD, targets_T = sample(16, 32, 64, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_T, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    have = torch.autograd.grad(loss_T.sum(), (hidden_TD, weight_VD))
    assert [tensor.dtype for tensor in have] == [torch.float32, torch.float32]
    narrow_T, _ = linear_cross_entropy(hidden_TD.bfloat16(), weight_VD.bfloat16(), targets_T)
    assert torch.equal(loss_T, narrow_T)


class LargestTensor(TorchDispatchMode):
    """Remembers how many values the largest tensor had that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.values = max([self.values, *sizes])
        return result


@pytest.mark.parametrize(("backend", "holds_logits"), [("reference", True), ("torch", False)])
def test_never_holds_all_logits(backend: str, holds_logits: bool) -> None:
    tokens, vocabulary, chunk = 96, 50, 8
    hidden_TD, weight_VD, targets_T = sample(tokens, 4, vocabulary)
    with LargestTensor() as largest:
        loss_T, _ = dispatch.load("linear_cross_entropy", backend)(hidden_TD, weight_VD, targets_T, -100, chunk, 1.0)
        loss_T.sum().backward()
    if holds_logits:
        assert largest.values == tokens * vocabulary
    else:
        assert largest.values <= max(chunk * vocabulary, tokens * 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 1), (13, 7), (20, 33), (0, 5)])
def test_a_weighted_sum_against_torch(
    backend: str, tokens: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked = importlib.import_module("deepwright_kernels.linear_cross_entropy.chunked")
    monkeypatch.setattr(chunked, "chunk_tokens", lambda *_: 6)
    hidden_TD, weight_VD, targets_T = sample(tokens, 6, vocabulary)
    token_weights_T = torch.randn(tokens, dtype=torch.float64, requires_grad=True)
    loss = dispatch.load("weighted_linear_cross_entropy", backend)(
        hidden_TD, weight_VD, targets_T, token_weights_T.detach(), -100, 0.7
    )
    gradients = torch.autograd.grad(3 * loss, (hidden_TD, weight_VD))

    logits_TV = hidden_TD @ weight_VD.T / 0.7
    losses_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none", ignore_index=-100)
    expected = (losses_T * token_weights_T.detach()).sum()
    torch.testing.assert_close(loss, expected)
    for have, want in zip(gradients, torch.autograd.grad(3 * expected, (hidden_TD, weight_VD)), strict=True):
        torch.testing.assert_close(have, want)


def test_a_weighted_sum_is_that_of_the_losses_whatever_is_asked_for() -> None:
    hidden_TD, weight_VD, targets_T = sample(9, 4, 11, torch.float32)
    token_weights_T = torch.rand(9)
    (losses_T, _) = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
    both = torch.autograd.grad((losses_T * token_weights_T).sum(), (hidden_TD, weight_VD))
    with torch.no_grad():
        loss = weighted_linear_cross_entropy(hidden_TD, weight_VD, targets_T, token_weights_T)
    torch.testing.assert_close(loss, (losses_T * token_weights_T).sum().detach())
    assert not loss.requires_grad
    frozen = weighted_linear_cross_entropy(hidden_TD, weight_VD.detach(), targets_T, token_weights_T)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden_TD)[0], both[0])
    alone = weighted_linear_cross_entropy(hidden_TD.detach(), weight_VD, targets_T, token_weights_T)
    torch.testing.assert_close(torch.autograd.grad(alone, weight_VD)[0], both[1])


def test_a_weighted_sum_has_one_backward_pass_and_says_so() -> None:
    hidden_TD, weight_VD, targets_T = sample(9, 4, 11)
    loss = weighted_linear_cross_entropy(hidden_TD, weight_VD, targets_T, torch.ones(9, requires_grad=True))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weighted_sum_follows_autocast() -> None:
    hidden_TD, weight_VD, targets_T = sample(16, 32, 64, torch.float32)
    token_weights_T = torch.full((16,), 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = weighted_linear_cross_entropy(hidden_TD, weight_VD, targets_T, token_weights_T)
    narrow = weighted_linear_cross_entropy(hidden_TD.bfloat16(), weight_VD.bfloat16(), targets_T, token_weights_T)
    assert torch.equal(loss, narrow) and loss.dtype == torch.float32
    assert [t.dtype for t in torch.autograd.grad(loss, (hidden_TD, weight_VD))] == [torch.float32] * 2


def test_errors_name_the_argument() -> None:
    hidden_TD, weight_VD, targets_T = sample(6, 3, 5)
    with pytest.raises(ValueError, match=r"weighted_linear_cross_entropy: token_weights_T has shape \[5\]"):
        weighted_linear_cross_entropy(hidden_TD, weight_VD, targets_T, torch.ones(5))
    with pytest.raises(TypeError, match="token_weights_T is int64"):
        weighted_linear_cross_entropy(hidden_TD, weight_VD, targets_T, torch.ones(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"weight_VD has shape \[5, 2\]; expected \[V, D\] = \[any, 3\]"):
        linear_cross_entropy(hidden_TD, weight_VD[:, :2], targets_T)
    with pytest.raises(ValueError, match=r"targets_T has shape \[5\]"):
        linear_cross_entropy(hidden_TD, weight_VD, targets_T[:5])
    with pytest.raises(TypeError, match="targets_T is float32; expected one of int64"):
        linear_cross_entropy(hidden_TD, weight_VD, targets_T.float())
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        linear_cross_entropy(hidden_TD, weight_VD, targets_T, temperature=0.0)
    with pytest.raises(ValueError, match="chunk is 0"):
        linear_cross_entropy(hidden_TD, weight_VD, targets_T, chunk=0)
    with pytest.raises(ValueError, match="weight_VD has no rows"):
        linear_cross_entropy(hidden_TD, weight_VD[:0], targets_T)
