"""Every row's bits are its own: whatever number of others shares the call, and wherever it stands among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from deepwright_kernels import (
    add_rms_norm,
    context_attention,
    draw_tokens,
    expert_order,
    grouped_linear,
    grouped_swiglu,
    latent_cache_write,
    linear_cross_entropy,
    mla_paged_decode,
    rms_norm,
    rotary,
    rotary_tail,
    route,
    unpermute,
)
from deepwright_kernels.row_by_row import is_row_by_row, row_by_row

DTYPES = [torch.float32, torch.bfloat16]
ROWS = 41


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def assert_rows_are_their_own(function: Callable[..., Any], *rows: Tensor) -> Any:
    """`function` of some rows, in any order and number, is those rows of `function` of all. Returns the whole."""
    with row_by_row():
        whole = function(*rows)
        for chosen in (
            torch.randperm(len(rows[0])),
            torch.arange(len(rows[0]))[3:20],
            *torch.arange(len(rows[0])).split(1)[::5],
        ):
            part = function(*(row[chosen] for row in rows))
            for one, all_of_them in zip(_tuple(part), _tuple(whole), strict=True):
                assert torch.equal(one, all_of_them[chosen])
    return whole


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 3), (24, 40), (100, 33), (512, 96)])
def test_products(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    x_TK, w_NK = torch.randn(ROWS, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    bias_N = torch.randn(outputs).to(dtype)
    y_TN = assert_rows_are_their_own(lambda x: F.linear(x, w_NK, bias_N), x_TK)
    torch.testing.assert_close(
        y_TN, F.linear(x_TK, w_NK, bias_N), atol=0.3 if dtype == torch.bfloat16 else 1e-4, rtol=0.02
    )
    assert torch.equal(assert_rows_are_their_own(lambda x: x @ w_NK.T, x_TK) + bias_N, y_TN)
    heads_HKN = torch.randn(3, inputs, outputs).to(dtype)
    assert_rows_are_their_own(
        lambda x: torch.bmm(x[None].expand(3, -1, -1), heads_HKN).transpose(0, 1).contiguous(), x_TK
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 48, 100])
def test_elementwise_functions_norms_and_rotations(dtype: torch.dtype, width: int) -> None:
    x_TD, weight_D = 3 * torch.randn(ROWS, width).to(dtype), torch.randn(width).to(dtype)
    for name, function in (("exp", torch.exp), ("sigmoid", torch.sigmoid), ("silu", F.silu)):
        got = assert_rows_are_their_own(function, x_TD)
        torch.testing.assert_close(got, function(x_TD), msg=name)
    torch.testing.assert_close(
        assert_rows_are_their_own(lambda x: rms_norm(x, weight_D, 1e-6), x_TD), rms_norm(x_TD, weight_D, 1e-6)
    )
    residual_TD = torch.randn_like(x_TD)
    torch.testing.assert_close(
        assert_rows_are_their_own(lambda x, r: add_rms_norm(x, r, weight_D, 1e-6), x_TD, residual_TD),
        add_rms_norm(x_TD, residual_TD, weight_D, 1e-6),
    )
    cos_TF, sin_TF = torch.randn(ROWS, 2), torch.randn(ROWS, 2)
    assert_rows_are_their_own(lambda x, c, s: rotary(x[:, :4], c, s), x_TD, cos_TF, sin_TF)
    assert_rows_are_their_own(rotary_tail, x_TD, cos_TF, sin_TF)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
def test_a_mixture(scoring: str) -> None:
    logits_TE, bias_E = torch.randn(ROWS, 8), torch.randn(8)
    gate_up_EID, down_EDI = torch.randn(8, 20, 24), torch.randn(8, 24, 10)

    def mixture(x_TD: Tensor, logits_TE: Tensor) -> tuple[Tensor, ...]:
        choice = route(
            logits_TE, bias_E, 3, scoring=scoring, groups=4, top_groups=2, group_best=2, normalise=True, scaling=2.5
        )
        order = expert_order(choice.experts_TK, 8)
        out_RD = grouped_linear(grouped_swiglu(x_TD, gate_up_EID, order), down_EDI, order.ends_E)
        return unpermute(out_RD, order, choice.weights_TK), choice.weights_TK

    x_TD = torch.randn(ROWS, 24)
    got, _ = assert_rows_are_their_own(mixture, x_TD, logits_TE)
    torch.testing.assert_close(got, mixture(x_TD, logits_TE)[0], atol=1e-3, rtol=1e-4)


def test_drawing() -> None:
    logits_BV, temperature_B = 3 * torch.randn(ROWS, 37), torch.rand(ROWS).round(decimals=1)
    seed_B, position_B = torch.randint(1 << 40, (2, ROWS))

    top_p_B, min_p_B = (torch.rand(ROWS) * 1.5 + 0.2).clamp(max=1.0), torch.rand(ROWS).clamp(min=0.9) - 0.9
    top_k_B = torch.randint(9, (ROWS,))

    def drawn(*rows: Tensor) -> tuple[Tensor, Tensor]:
        return draw_tokens(*rows)

    rows = (logits_BV, temperature_B, top_p_B, min_p_B, top_k_B, seed_B, position_B)
    token_B, logprob_B = assert_rows_are_their_own(drawn, *rows)
    assert torch.equal(token_B, drawn(*rows)[0])
    torch.testing.assert_close(logprob_B, drawn(*rows)[1])


def paged(lengths: list[int], width: int, size: int) -> tuple[Tensor, Tensor]:
    """A cache whose blocks lie in any order, and NaN where nothing was written."""
    counts = [-(-length // size) for length in lengths]
    numbers = (torch.randperm(sum(counts)) + 1).split(counts)
    cache_NW = torch.full(((sum(counts) + 1) * size, width), torch.nan)
    blocks_BP = torch.zeros(len(lengths), max(counts), dtype=torch.int64)
    for row, (length, blocks) in enumerate(zip(lengths, numbers, strict=True)):
        blocks_BP[row, : len(blocks)] = blocks
        slots = (blocks[:, None] * size + torch.arange(size)).flatten()[:length]
        cache_NW[slots] = torch.randn(length, width)
    return cache_NW, blocks_BP


def test_a_query_does_not_know_how_it_came() -> None:
    """Alone, in a chunk, or beside longer sequences: a token's attention has the same bits."""
    heads, latent, rope, size = 3, 16, 8, 4
    lengths = [150, 33, 7]
    cache_NW, blocks_BP = paged(lengths, latent + rope, size)
    q = [torch.randn(length, heads, latent + rope) for length in lengths]

    def attended(sequence: int, begin: int, end: int, beside: list[int]) -> Tensor:
        rows = [sequence, *beside]
        queries = end - begin
        q_BQHW = torch.stack([q[row][torch.arange(begin, end) % lengths[row]] for row in rows])
        positions_BQ = torch.stack([torch.arange(begin, end) % lengths[row] for row in rows])
        lengths_B = torch.tensor([end, *(lengths[row] for row in beside)])
        with row_by_row():
            out = mla_paged_decode(
                q_BQHW[..., :latent],
                q_BQHW[..., latent:],
                cache_NW,
                blocks_BP[rows],
                positions_BQ,
                lengths_B,
                size,
                0.2,
            )
        assert out.shape == (len(rows), queries, heads, latent) and out.isfinite().all()
        return out[0]

    for sequence, length in enumerate(lengths):
        whole = attended(sequence, 0, length, [])
        others = [row for row in range(3) if row != sequence]
        for begin, end in ((0, 5), (length - 3, length), (length // 2, length // 2 + 1), (1, length - 1)):
            assert torch.equal(attended(sequence, begin, end, []), whole[begin:end])
            assert torch.equal(attended(sequence, begin, end, others), whole[begin:end])
    plain = mla_paged_decode(
        q[1][None, ..., :latent], q[1][None, ..., latent:], cache_NW, blocks_BP[1:2], torch.arange(33)[None],
        torch.tensor([33]), size, 0.2,
    )  # fmt: skip
    torch.testing.assert_close(attended(1, 0, 33, [])[None], plain)


def test_grouped_queries_do_not_know_how_they_came() -> None:
    lengths = [90, 20]
    k, v = torch.randn(2, 90, 2, 8), torch.randn(2, 90, 2, 6)
    k[1, 20:] = torch.nan
    q = torch.randn(2, 90, 4, 8)

    def attended(rows: list[int], begin: int, end: int, context: int, starts: bool) -> Tensor:
        positions_BQ = torch.arange(begin, end).expand(len(rows), -1)
        with row_by_row():
            return context_attention(
                q[rows, begin:end],
                lambda first, last: (k[rows, first:last], v[rows, first:last]),
                context,
                positions_BQ,
                torch.tensor([min(end, lengths[row]) for row in rows]),
                0.3,
                (positions_BQ - 3).clamp(min=0) if starts else None,
            )

    for starts in (False, True):
        whole = attended([0], 0, 90, 90, starts)[0]
        for begin, end in ((0, 1), (63, 65), (40, 90)):
            assert torch.equal(attended([0], begin, end, end, starts)[0], whole[begin:end])
            assert torch.equal(attended([1, 0], begin, end, 90, starts)[1], whole[begin:end])
        want = context_attention(
            q[:1], lambda first, last: (k[:1, first:last], v[:1, first:last]), 90, torch.arange(90)[None],
            torch.tensor([90]), 0.3, (torch.arange(90)[None] - 3).clamp(min=0) if starts else None,
        )  # fmt: skip
        torch.testing.assert_close(whole[None], want, atol=1e-5, rtol=1e-5)


def test_the_cache_is_written_row_by_row() -> None:
    kv_TW, weight_C = torch.randn(ROWS, 20), torch.randn(12)
    cos_TF, sin_TF = torch.randn(ROWS, 4), torch.randn(ROWS, 4)

    def written(kv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cache_NW = torch.zeros(len(kv), 20)
        latent_cache_write(kv, weight_C, 1e-6, cos, sin, cache_NW, torch.arange(len(kv)))
        return cache_NW

    got = assert_rows_are_their_own(written, kv_TW, cos_TF, sin_TF)
    torch.testing.assert_close(got, written(kv_TW, cos_TF, sin_TF))


def test_it_holds_inside_for_this_thread_and_refuses_what_has_no_form() -> None:
    q = torch.randn(1, 1, 4, 8)
    with row_by_row():
        with row_by_row():
            assert is_row_by_row()
        assert is_row_by_row()
        with pytest.raises(NotImplementedError, match="scaled_dot_product_attention was called"):
            F.scaled_dot_product_attention(q, q, q)
        with pytest.raises(NotImplementedError, match="einsum"):
            torch.einsum("ab,bc->ac", q[0, 0], q[0, 0].T)
        with pytest.raises(NotImplementedError, match="linear_cross_entropy has no form"):
            linear_cross_entropy(q[0, 0], torch.randn(5, 8), torch.zeros(4, dtype=torch.int64))
        with pytest.raises(NotImplementedError, match=r"\[4, 8\] and \[8\]"):
            _ = q[0, 0] @ torch.randn(8)
    assert not is_row_by_row()
    F.scaled_dot_product_attention(q, q, q)
