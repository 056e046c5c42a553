"""The loss of a linear head in slices of the vocabulary: kernels against reference."""

import importlib

import pytest
import torch
from torch import Tensor

from deepwright_kernels import dispatch, linear_cross_entropy, weighted_linear_cross_entropy

from .sides import DEVICE, OPCHECKS, TOLERANCE, draw

NAME = "linear_cross_entropy"
IGNORED = -100


@pytest.fixture
def narrow_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer so small that the vocabulary comes in slices of 32 for 16 tokens in float32; casts 32 columns wide."""
    triton = importlib.import_module("deepwright_kernels.linear_cross_entropy.triton")
    monkeypatch.setattr(triton, "BUFFER_BYTES", 16 * 32 * 4)
    monkeypatch.setattr(triton, "COLUMNS_MULTIPLE", 16)
    if DEVICE == "cpu":
        monkeypatch.setattr(triton, "CAST_COLUMNS", 32)
        for name, size in (("BLOCK_K", 16), ("BLOCK_C", 32), ("BLOCK_D", 16), ("GROUP", 2)):
            monkeypatch.setattr(triton.tiles, name, size)


def sample(
    tokens: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    targets_T = torch.randint(vocabulary, (tokens,), device=DEVICE)
    targets_T[1::4] = IGNORED
    return draw(tokens, width, dtype=dtype, grad=True), draw(vocabulary, width, dtype=dtype, grad=True), targets_T


def results(function, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *rest) -> tuple[Tensor, ...]:
    """(loss, entropy, gradients); the upstream gradient differs from token to token."""
    loss_T, entropy_T = function(hidden_TD, weight_VD, targets_T, *rest)
    assert not entropy_T.requires_grad
    upstream_T = torch.linspace(-1, 2, len(loss_T), device=loss_T.device)
    return loss_T, entropy_T, *torch.autograd.grad(loss_T, (hidden_TD, weight_VD), upstream_T)


def agree(arguments: tuple, tolerance: dict[str, float]) -> tuple[Tensor, ...]:
    have = results(dispatch.load(NAME, "triton"), *arguments)
    want = results(dispatch.load(NAME, "reference"), *arguments)
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)
    return have


@pytest.mark.usefixtures("narrow_slices")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary", "chunk"), [(13, 70, None), (20, 33, 8), (1, 1, None), (16, 65, 16)])
def test_slices_of_the_vocabulary_and_blocks_of_tokens(
    tokens: int, vocabulary: int, chunk: int | None, dtype: torch.dtype
) -> None:
    for width in (24, 6):  # the second is not aligned: no tiles
        agree((*sample(tokens, width, vocabulary, dtype), IGNORED, chunk, 0.7), TOLERANCE[dtype])


def test_one_slice_with_several_blocks_of_columns() -> None:
    agree((*sample(3, 8, 2500), IGNORED, None, 1.0), TOLERANCE[torch.float32])


@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_to_learn(tokens: int) -> None:
    hidden_TD, weight_VD, targets_T = sample(tokens, 6, 9)
    for result in results(linear_cross_entropy, hidden_TD, weight_VD, torch.full_like(targets_T, IGNORED)):
        assert not result.any()


@pytest.mark.usefixtures("narrow_slices")
@pytest.mark.parametrize("tokens", [7, 33])
def test_a_weight_in_float32_beside_hidden_states_in_bfloat16(tokens: int) -> None:
    hidden_TD, weight_VD, targets_T = sample(tokens, 16, 50)
    hidden_TD = hidden_TD.detach().bfloat16().requires_grad_()
    *_, grad_hidden_TD, grad_weight_VD = agree(
        (hidden_TD, weight_VD, targets_T, IGNORED, 16), TOLERANCE[torch.bfloat16]
    )
    assert (grad_hidden_TD.dtype, grad_weight_VD.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.usefixtures("narrow_slices")
def test_huge_logits() -> None:
    hidden_TD, weight_VD, targets_T = sample(16, 6, 70)
    arguments = ((hidden_TD.detach() * 1e4).requires_grad_(), weight_VD, targets_T)
    have, want = (results(dispatch.load(NAME, backend), *arguments) for backend in ("triton", "reference"))
    for a, b in zip(have, want, strict=True):
        assert torch.isfinite(a).all() and (a - b).norm() <= 0.01 * b.norm() + 0.01


@pytest.mark.usefixtures("narrow_slices")
def test_only_the_gradients_that_are_asked_for() -> None:
    hidden_TD, weight_VD, targets_T = sample(9, 6, 40)
    both = torch.autograd.grad(linear_cross_entropy(hidden_TD, weight_VD, targets_T)[0].sum(), (hidden_TD, weight_VD))
    frozen = linear_cross_entropy(hidden_TD, weight_VD.detach(), targets_T)[0].sum()
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden_TD)[0], both[0])
    alone = linear_cross_entropy(hidden_TD.detach(), weight_VD, targets_T)[0].sum()
    torch.testing.assert_close(torch.autograd.grad(alone, weight_VD)[0], both[1])


@pytest.mark.usefixtures("narrow_slices")
def test_the_same_every_time() -> None:
    arguments = sample(21, 6, 70)
    first, second = (results(linear_cross_entropy, *arguments) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_strided_hidden_and_a_slice_of_a_weight() -> None:
    hidden_TD, weight_VD, targets_T = sample(9, 24, 40)
    arguments = (hidden_TD.detach()[:, ::2].requires_grad_(), weight_VD.detach()[5:, 12:].requires_grad_())
    agree((*arguments, targets_T.clamp(max=30)), TOLERANCE[torch.float32])


def test_operators_are_registered_as_torch_expects() -> None:
    operators = torch.ops.deepwright
    hidden_TD, weight_VD, targets_T = sample(5, 6, 9)
    constants = (IGNORED, None, 0.9)
    torch.library.opcheck(
        operators.linear_cross_entropy, (hidden_TD, weight_VD, targets_T, *constants), test_utils=OPCHECKS
    )
    partition_T = operators.linear_cross_entropy(hidden_TD, weight_VD, targets_T, *constants)[2].detach()
    for asked in ((True, True), (False, True)):
        torch.library.opcheck(
            operators.linear_cross_entropy_backward,
            (
                torch.randn_like(partition_T),
                hidden_TD.detach(),
                weight_VD.detach(),
                targets_T,
                partition_T,
                *constants,
                *asked,
            ),
            test_utils=OPCHECKS,
        )


def test_compiled_whole() -> None:
    hidden_TD, weight_VD, targets_T = sample(9, 6, 40)

    def mean(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        loss_T, entropy_T = linear_cross_entropy(hidden_TD * 2, weight_VD, targets_T)
        return loss_T.mean() + entropy_T.sum()

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    leaves = (hidden_TD, weight_VD)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(mean(*leaves), leaves)
    )


@pytest.fixture
def narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer for the logits of 8 tokens over 70 words in float32."""
    triton = importlib.import_module("deepwright_kernels.linear_cross_entropy.weighted_triton")
    monkeypatch.setattr(triton, "BUFFER_BYTES", 8 * 70 * 4)
    monkeypatch.setattr(triton, "TOKENS_MULTIPLE", 8)


def weighted(backend: str, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *rest) -> tuple[Tensor, ...]:
    """(loss, gradients) with another weight for each token, and a factor that comes with the backward pass."""
    token_weights_T = torch.linspace(-1, 2, len(targets_T), device=DEVICE)
    loss = dispatch.load("weighted_linear_cross_entropy", backend)(
        hidden_TD, weight_VD, targets_T, token_weights_T, IGNORED, *rest
    )
    return loss.detach(), *torch.autograd.grad(3 * loss, (hidden_TD, weight_VD))


@pytest.mark.usefixtures("narrow_blocks")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(13, 70), (21, 33), (1, 1), (0, 5)])
def test_a_weighted_sum(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    arguments = sample(tokens, 16, vocabulary, dtype)
    for a, b in zip(weighted("triton", *arguments, 0.7), weighted("reference", *arguments, 0.7), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        # One word has the probability 1 and no gradient: what is left of it then is rounding, next to inputs near 1.
        assert (a - b).float().norm() <= TOLERANCE[dtype]["rtol"] * b.float().norm() + 1e-5


@pytest.mark.usefixtures("narrow_blocks")
def test_a_weighted_sum_with_a_weight_in_float32_and_huge_logits() -> None:
    hidden_TD, weight_VD, targets_T = sample(20, 16, 50)
    arguments = ((hidden_TD.detach() * 300).bfloat16().requires_grad_(), weight_VD, targets_T)
    have, want = weighted("triton", *arguments), weighted("reference", *arguments)
    assert (have[1].dtype, have[2].dtype) == (torch.bfloat16, torch.float32)
    for a, b in zip(have, want, strict=True):
        assert torch.isfinite(a).all() and (a - b).norm() <= 0.02 * b.norm()
    for a, b in zip(have, weighted("triton", *arguments), strict=True):
        assert torch.equal(a, b)


def test_a_weighted_sum_without_gradients_or_with_one() -> None:
    hidden_TD, weight_VD, targets_T = sample(9, 6, 40)
    token_weights_T = torch.rand(9, device=DEVICE)

    def loss(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return weighted_linear_cross_entropy(hidden_TD, weight_VD, targets_T, token_weights_T)

    both = torch.autograd.grad(loss(hidden_TD, weight_VD), (hidden_TD, weight_VD))
    torch.testing.assert_close(torch.autograd.grad(loss(hidden_TD, weight_VD.detach()), hidden_TD)[0], both[0])
    torch.testing.assert_close(torch.autograd.grad(loss(hidden_TD.detach(), weight_VD), weight_VD)[0], both[1])
    with torch.no_grad():
        torch.testing.assert_close(loss(hidden_TD, weight_VD), loss(hidden_TD.detach().requires_grad_(), weight_VD))


def test_a_weighted_sum_is_registered_and_compiled_whole() -> None:
    hidden_TD, weight_VD, targets_T = sample(9, 6, 40)
    token_weights_T = torch.rand(9, device=DEVICE)
    torch.library.opcheck(
        torch.ops.deepwright.weighted_linear_cross_entropy,
        (hidden_TD.detach(), weight_VD.detach(), targets_T, token_weights_T, IGNORED, 0.9, True, False),
        test_utils=OPCHECKS,
    )

    def mean(hidden_TD: Tensor, weight_VD: Tensor) -> Tensor:
        return weighted_linear_cross_entropy(hidden_TD * 2, weight_VD, targets_T, token_weights_T) * 3

    compiled = torch.compile(mean, fullgraph=True, backend="aot_eager")
    leaves = (hidden_TD, weight_VD)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(mean(*leaves), leaves)
    )


def test_sums_stay_float32_under_autocast() -> None:
    hidden_TD, weight_VD, targets_T = sample(40, 32, 64)
    token_weights_T = torch.rand(40, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss_T, _ = linear_cross_entropy(hidden_TD, weight_VD, targets_T)
        total = weighted_linear_cross_entropy(hidden_TD, weight_VD, targets_T, token_weights_T)
    assert loss_T.dtype == total.dtype == torch.float32
    torch.testing.assert_close(total, (loss_T * token_weights_T).sum(), rtol=1e-6, atol=0)
