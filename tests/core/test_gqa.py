"""Grouped-query attention: against loops over heads and queries, torch's own attention, and its paged form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepwright_core.model.attention import GQAConfig, GroupedQueryAttention, build_gqa, document_starts
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig, RopeConfig, YarnConfig
from deepwright_core.model.rope import Rotary
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import Registry

YARN = RopeConfig(yarn=YarnConfig(factor=4, original_positions=8))
HIDDEN, LONGEST, BLOCK = 12, 32, 4


def build(
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 6,
    rope: RopeConfig | None = None,
    qkv_bias: bool = False,
    hidden_size: int = HIDDEN,
) -> GroupedQueryAttention:
    config = GQAConfig(heads=heads, kv_heads=kv_heads, head_dim=head_dim, qkv_bias=qkv_bias)
    model = ModelConfig(
        hidden_size=hidden_size,
        layers=1,
        intermediate_size=4,
        rope=rope or RopeConfig(),
        attention=config.model_dump(),
        ffn={"name": "dense"},
    )
    torch.manual_seed(0)
    return build_gqa(config, model, 0).double()


def table_of(attention: GroupedQueryAttention, rope: RopeConfig | None = None) -> Rotary:
    return Rotary(attention.rope_dim, rope or RopeConfig(), LONGEST)


def turned(x_K: Tensor, table: Rotary, position: int) -> Tensor:
    cos_F, sin_F = (t.double() for t in table(torch.tensor(position)))
    z_F = torch.view_as_complex(x_K.view(-1, 2)) * torch.complex(cos_F, sin_F)
    return torch.view_as_real(z_F).flatten()


def naive(attention: GroupedQueryAttention, x_SD: Tensor, table: Rotary, segments: list[int]) -> Tensor:
    """One sequence, one head, one query at a time."""
    width, share = attention.head_dim, attention.heads // attention.kv_heads
    rows = []
    for t in range(len(x_SD)):
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        heads = []
        for head in range(attention.heads):
            mine, theirs = slice(head * width, (head + 1) * width), head // share
            served = slice(theirs * width, (theirs + 1) * width)
            q_K = turned(attention.q.weight[mine] @ x_SD[t], table, t)
            scores = [float(q_K @ turned(attention.k.weight[served] @ x_SD[s], table, s)) for s in seen]
            weights = (torch.tensor(scores, dtype=torch.float64) * attention.scale).softmax(0)
            heads.append(sum(w * (attention.v.weight[served] @ x_SD[s]) for w, s in zip(weights, seen, strict=True)))
        rows.append(attention.o.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("rope", [RopeConfig(), YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@torch.no_grad()
def test_training_form_is_the_loop_over_heads(heads: int, kv_heads: int, rope: RopeConfig) -> None:
    attention = build(heads, kv_heads, rope=rope)
    table, x_BSD = table_of(attention, rope), torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    have = attention(x_BSD, table(torch.arange(7)[None]), None)
    for row in range(2):
        torch.testing.assert_close(have[row], naive(attention, x_BSD[row], table, [0] * 7), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_packed_documents_do_not_see_each_other() -> None:
    attention = build()
    table, x_BSD = table_of(attention), torch.randn(1, 8, HIDDEN, dtype=torch.float64)
    segments = [0, 0, 0, 1, 1, 2, 2, 2]
    have = attention(x_BSD, table(torch.arange(8)[None]), document_starts(torch.tensor([segments])))
    torch.testing.assert_close(have[0], naive(attention, x_BSD[0], table, segments), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_equal_head_counts_are_torch_multi_head_attention() -> None:
    attention = build(heads=4, kv_heads=4)
    x_BSD = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    still = (torch.ones(1, 5, 3), torch.zeros(1, 5, 3))  # no rotation: what is left is plain attention

    def split(linear: torch.nn.Linear) -> Tensor:
        return linear(x_BSD).view(2, 5, 4, 6).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        split(attention.q), split(attention.k), split(attention.v), is_causal=True, scale=6**-0.5
    )
    torch.testing.assert_close(attention(x_BSD, still, None), attention.o(mixed.transpose(1, 2).flatten(2)))


def paged(
    attention: GroupedQueryAttention, x_BSD: Tensor, table: Rotary, plan: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """Feed each step's count of new tokens of each sequence (0: not in this batch); outputs [B, S, D] and the cache.

    Blocks are shuffled and the cache begins as NaN, so that reading anything but one's own tokens shows.
    """
    sequences, size = x_BSD.shape[:2]
    pages = -(-size // BLOCK)
    order = (torch.randperm(sequences * pages, generator=torch.Generator().manual_seed(1)) + 1).view(sequences, pages)
    cache_NW = torch.full(((sequences * pages + 1) * BLOCK, attention.cache_width), torch.nan, dtype=x_BSD.dtype)
    out_BSD, done = torch.full_like(x_BSD, torch.nan), [0] * sequences
    for counts in plan:
        rows = [b for b in range(sequences) if counts[b]]
        x_RQD = x_BSD.new_zeros(len(rows), max(counts), x_BSD.shape[-1])
        positions, slots = (torch.zeros(len(rows), max(counts), dtype=torch.int64) for _ in range(2))
        for r, b in enumerate(rows):
            for n in range(counts[b]):
                at = done[b] + n
                x_RQD[r, n] = x_BSD[b, at]
                positions[r, n] = at
                slots[r, n] = order[b, at // BLOCK] * BLOCK + at % BLOCK
        lengths = torch.tensor([done[b] + counts[b] for b in rows])
        used = -(-int(lengths.max()) // BLOCK)
        blocks = torch.stack([order[b, :used] * (torch.arange(used) * BLOCK < done[b] + counts[b]) for b in rows])
        batch = CacheBatch(positions, slots, blocks, lengths, BLOCK)
        y_RQD = attention.extend(x_RQD, table(positions), cache_NW, batch)
        for r, b in enumerate(rows):
            out_BSD[b, done[b] : done[b] + counts[b]] = y_RQD[r, : counts[b]]
            done[b] += counts[b]
    return out_BSD, cache_NW[(order[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)]


PLANS = {
    "token by token": [[1, 1, 1]] * 11,
    "all at once": [[11, 11, 11]],
    "unequal prompts, then decode": [[7, 2, 5], *[[1, 1, 1]] * 4, [0, 5, 2]],
    "chunks": [[3, 0, 6], [5, 4, 0], [3, 7, 5]],
}


@pytest.mark.parametrize("rope", [RopeConfig(), YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_paged_form_is_the_training_form(plan: str, rope: RopeConfig) -> None:
    attention = build(rope=rope)
    table, x_BSD = table_of(attention, rope), torch.randn(3, 11, HIDDEN, dtype=torch.float64)
    want = attention(x_BSD, table(torch.arange(11)[None]), None)
    have, _ = paged(attention, x_BSD, table, PLANS[plan])
    torch.testing.assert_close(have, want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_cache_holds_rotated_keys_then_values() -> None:
    attention = build()
    table, x_BSD = table_of(attention), torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    assert attention.cache_width == 2 * 2 * 6
    _, cached_BLW = paged(attention, x_BSD, table, [[4, 6], [2, 0]])
    for b in range(2):
        for t in range(6):
            keys = [turned(k, table, t) for k in (attention.k.weight @ x_BSD[b, t]).view(2, 6)]
            want = torch.cat([*keys, attention.v.weight @ x_BSD[b, t]])
            torch.testing.assert_close(cached_BLW[b, t], want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (2, 4)])
def test_heads_must_share_evenly(heads: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=f"heads is {heads}; expected a multiple of kv_heads, which is {kv_heads}"):
        GQAConfig(heads=heads, kv_heads=kv_heads)


@torch.no_grad()
def test_biases_are_added_before_the_rotation_in_both_forms() -> None:
    """As Qwen2 has them: on queries, keys and values, none on the output."""
    attention, plain = build(qkv_bias=True), build()
    assert {name for name, _ in attention.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "q.bias",
        "k.bias",
        "v.bias",
    }
    table, x_BSD = table_of(attention), torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    # The same as a weight for an input that is always 1.
    wider = build(hidden_size=HIDDEN + 1)
    for name in ("q", "k", "v"):
        linear, other = getattr(attention, name), getattr(wider, name)
        linear.bias.normal_()
        other.weight.copy_(torch.cat([linear.weight, linear.bias[:, None]], 1))
    wider.o.weight[:HIDDEN] = attention.o.weight
    ones = torch.ones(2, 5, 1, dtype=torch.float64)
    have = attention(x_BSD, table(torch.arange(5)[None]), None)
    want = wider(torch.cat([x_BSD, ones], -1), table(torch.arange(5)[None]), None)[..., :HIDDEN]
    torch.testing.assert_close(have, want)
    stepwise, _ = paged(attention, x_BSD, table, [[3, 1], [1, 1], [1, 3]])
    torch.testing.assert_close(stepwise, have)


def test_biases_start_at_zero(registry: Registry) -> None:
    attention = {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4, "qkv_bias": True}
    sizes = {"vocab_size": 7, "hidden_size": 6, "layers": 2, "intermediate_size": 5}
    model = build_model(registry, ModelConfig(**sizes, attention=attention, ffn={"name": "dense"}), seed=0)
    biases = {name: parameter for name, parameter in model.named_parameters() if name.endswith(".bias")}
    assert len(biases) == 2 * 3 and not any(bias.any() for bias in biases.values())
