"""Multi-head latent attention: the training form against loops over heads and queries, the paged form against both.

The loops read like the DeepSeek-V2 report, section 2.1: nothing absorbed, nothing batched.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.model.attention import document_starts
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig, RopeConfig, YarnConfig
from deepwright_core.model.norm import RMSNorm
from deepwright_core.model.rope import Rotary
from deepwright_mla.latent_attention import ABSORBED_QUERIES, LatentAttention, MLAConfig, build_mla

YARN = RopeConfig(yarn=YarnConfig(factor=4, original_positions=8))
HIDDEN, HEADS, LATENT, NOPE, ROPE, VALUE, LONGEST, BLOCK = 12, 3, 10, 6, 4, 5, 32, 4
VARIANTS = pytest.mark.parametrize(
    ("q_lora_rank", "rope"),
    [(0, RopeConfig()), (7, RopeConfig()), (0, YARN), (7, YARN)],
    ids=["plain", "q_lora", "yarn", "q_lora yarn"],
)


def build(q_lora_rank: int = 7, rope: RopeConfig | None = None, **sizes: Any) -> LatentAttention:
    values = {"heads": HEADS, "kv_lora_rank": LATENT, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE}
    config = MLAConfig(**{**values, "q_lora_rank": q_lora_rank, "v_head_dim": VALUE, **sizes})
    model = ModelConfig(
        hidden_size=HIDDEN,
        layers=1,
        intermediate_size=4,
        norm_eps=0.1,  # the blocks' norms' and not that of the latents'
        rope=rope or RopeConfig(),
        attention=config.model_dump(),
        ffn={"name": "dense"},
    )
    torch.manual_seed(0)
    attention = build_mla(config, model, 0).double()
    for name, parameter in attention.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    return attention


def table_of(attention: LatentAttention, rope: RopeConfig | None = None) -> Rotary:
    return Rotary(attention.rope_dim, rope or RopeConfig(), LONGEST)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(x_R: Tensor, table: Rotary, position: int) -> Tensor:
    """Pairs (0, 1), (2, 3), ... as complex numbers, turned."""
    cos_F, sin_F = (t.double() for t in table(torch.tensor(position)))
    return torch.view_as_real(torch.view_as_complex(x_R.view(-1, 2)) * torch.complex(cos_F, sin_F)).flatten()


def cached(attention: LatentAttention, x_D: Tensor, table: Rotary, position: int) -> Tensor:
    """What the report caches of a token: the normed latent, then the rotated rope key, which has no norm."""
    latent_rope = attention.kv_a.weight @ x_D
    latent_C = normed(latent_rope[:LATENT], attention.kv_norm.weight)
    return torch.cat([latent_C, turned(latent_rope[LATENT:], table, position)])


def naive(attention: LatentAttention, x_SD: Tensor, table: Rotary, segments: list[int]) -> Tensor:
    """One sequence, one head, one query at a time."""
    rows = []
    for t in range(len(x_SD)):
        if attention.q_lora:
            query = attention.q_b.weight @ normed(attention.q_a.weight @ x_SD[t], attention.q_norm.weight)
        else:
            query = attention.q.weight @ x_SD[t]
        heads = []
        for head in range(HEADS):
            q = query[head * (NOPE + ROPE) : (head + 1) * (NOPE + ROPE)]
            q_nope, q_rope = q[:NOPE], turned(q[NOPE:], table, t)
            up = attention.kv_b.weight[head * (NOPE + VALUE) : (head + 1) * (NOPE + VALUE)]
            scores, values = [], []
            for s in range(t + 1):
                if segments[s] == segments[t]:
                    token = cached(attention, x_SD[s], table, s)
                    key_value = up @ token[:LATENT]
                    scores.append(q_nope @ key_value[:NOPE] + q_rope @ token[LATENT:])
                    values.append(key_value[NOPE:])
            weights = (torch.stack(scores) * attention.scale).softmax(0)
            heads.append(weights @ torch.stack(values))
        rows.append(attention.o.weight @ torch.cat(heads))
    return torch.stack(rows)


@VARIANTS
@torch.no_grad()
def test_training_form_is_the_loop_over_heads(q_lora_rank: int, rope: RopeConfig) -> None:
    attention = build(q_lora_rank, rope)
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


def paged(attention: LatentAttention, x_BSD: Tensor, table: Rotary, plan: list[list[int]]) -> tuple[Tensor, Tensor]:
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
        y_RQD = attention.extend(
            x_RQD, table(positions), cache_NW, CacheBatch(positions, slots, blocks, lengths, BLOCK)
        )
        for r, b in enumerate(rows):
            out_BSD[b, done[b] : done[b] + counts[b]] = y_RQD[r, : counts[b]]
            done[b] += counts[b]
    return out_BSD, cache_NW[(order[:, :, None] * BLOCK + torch.arange(BLOCK)).flatten(1)]


PLANS = {
    "absorbed, 1 at a time": [[1, 1, 1]] * 12,
    "absorbed, 2 at a time": [[2, 2, 2]] * 6,
    "absorbed, 3 at a time": [[3, 3, 3]] * 4,
    "absorbed, 4 at a time": [[4, 4, 4]] * 3,
    "expanded, 6 at a time": [[6, 6, 6]] * 2,
    "expanded, all at once": [[12, 12, 12]],
    "expanded prompts of unequal length, then absorbed": [[9, 2, 6], *[[1, 1, 1]] * 3, [0, 7, 3]],
    "both, and not everyone every time": [[3, 0, 6], [5, 4, 0], [1, 1, 1], [3, 7, 5]],
}


@pytest.mark.parametrize("plan", PLANS)
@VARIANTS
@torch.no_grad()
def test_paged_form_is_the_training_form(
    monkeypatch: pytest.MonkeyPatch, plan: str, q_lora_rank: int, rope: RopeConfig
) -> None:
    attention = build(q_lora_rank, rope)
    table, x_BSD = table_of(attention, rope), torch.randn(3, 12, HIDDEN, dtype=torch.float64)
    want = attention(x_BSD, table(torch.arange(12)[None]), None)
    forms = []
    absorbed, expanded = attention._attend_absorbed, attention._attend_expanded
    monkeypatch.setattr(attention, "_attend_absorbed", lambda *a: forms.append("absorbed") or absorbed(*a))
    monkeypatch.setattr(attention, "_attend_expanded", lambda *a: forms.append("expanded") or expanded(*a))
    have, _ = paged(attention, x_BSD, table, PLANS[plan])
    torch.testing.assert_close(have, want, atol=1e-6, rtol=1e-5)
    # The plan took the way that its name says.
    assert forms == ["absorbed" if max(counts) <= ABSORBED_QUERIES else "expanded" for counts in PLANS[plan]]


@torch.no_grad()
def test_the_cache_holds_the_normed_latent_then_the_rotated_rope_key() -> None:
    attention = build()
    table, x_BSD = table_of(attention), torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    assert attention.cache_width == LATENT + ROPE
    _, cached_BLW = paged(attention, x_BSD, table, [[4, 6], [3, 1]])
    for b in range(2):
        for t in range(7):
            want = cached(attention, x_BSD[b, t], table, t)
            torch.testing.assert_close(cached_BLW[b, t], want, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_cache_does_not_depend_on_how_it_was_filled() -> None:
    attention = build()
    table, x_BSD = table_of(attention), torch.randn(3, 12, HIDDEN, dtype=torch.float64)
    contents = [paged(attention, x_BSD, table, plan)[1] for plan in PLANS.values()]
    for other in contents[1:]:
        torch.testing.assert_close(other, contents[0])


def test_the_softmax_scale_is_that_of_the_whole_query_with_yarns_square() -> None:
    published = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    assert build(0, **published).scale == 192**-0.5
    v3 = RopeConfig(yarn=YarnConfig(factor=40, original_positions=4096))
    assert build(0, v3, **published).scale * 192**0.5 == pytest.approx(1.87385, abs=1e-5)


@torch.no_grad()
def test_one_rope_key_serves_all_heads() -> None:
    """Turning off every latent leaves scores that depend on the shared rope key alone."""
    attention = build(0)
    attention.kv_b.weight.zero_()
    value = slice(NOPE, NOPE + VALUE)
    attention.kv_b.weight[value, 0] = 1.0  # head 0 returns what it attended to; the other heads nothing
    attention.o.weight.zero_()
    attention.o.weight[0, 0] = 1.0
    table, x_BSD = table_of(attention), torch.randn(1, 5, HIDDEN, dtype=torch.float64)
    before = attention(x_BSD, table(torch.arange(5)[None]), None)
    attention.kv_a.weight[LATENT:] *= 3
    after = attention(x_BSD, table(torch.arange(5)[None]), None)
    assert (before - after)[0, 1:, 0].abs().min() > 1e-6
    assert torch.equal(before[0, 0], after[0, 0])  # the first token sees only itself


def test_gradients_reach_every_weight() -> None:
    attention = build()
    x_BSD = torch.randn(2, 6, HIDDEN, dtype=torch.float64, requires_grad=True)
    attention(x_BSD, table_of(attention)(torch.arange(6)[None]), None).square().sum().backward()
    for name, parameter in attention.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-9, name


def test_published_layer_has_the_published_number_of_weights() -> None:
    """V3: 7168·1536 + 1536·24576 + 7168·576 + 512·32768 + 16384·7168 matrices, and two norms: 187.1 M."""
    config = MLAConfig(
        heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    model = ModelConfig(
        hidden_size=7168, layers=1, intermediate_size=1, attention=config.model_dump(), ffn={"name": "dense"}
    )
    with torch.device("meta"):
        attention = build_mla(config, model, 0)
    assert attention.cache_width == 576
    matrices = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168
    assert sum(p.numel() for p in attention.parameters()) == matrices + 1536 + 512 == 187_107_328


@pytest.mark.parametrize("q_lora_rank", [0, 7])
def test_the_norms_of_the_latents_have_an_eps_of_their_own(q_lora_rank: int) -> None:
    """Published code takes 1e-6 there, also where the model's own norm_eps is another (Moonlight: 1e-5)."""
    usual, other = build(q_lora_rank), build(q_lora_rank, latent_norm_eps=0.01)
    assert {module.eps for module in usual.modules() if isinstance(module, RMSNorm)} == {1e-6}
    assert {module.eps for module in other.modules() if isinstance(module, RMSNorm)} == {0.01}


def test_decoding_costs_what_the_absorbed_form_multiplies() -> None:
    """A pair of query and key: a score over latent and rope key, and a mix of latents, in every head."""
    attention = build()
    assert attention.pair_flops == 2 * HEADS * (NOPE + ROPE + VALUE)
    assert attention.pair_flops_decode == 2 * HEADS * (LATENT + ROPE + LATENT)
