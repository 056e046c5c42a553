"""Latent attention for few queries: what `extend` gives and caches, over random caches, and over one with no numbers
beyond a sequence's end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core import plugin as core
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig, RopeConfig, YarnConfig
from deepwright_core.model.few_rows import Shared
from deepwright_core.model.rope import Rotary
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import Registry
from deepwright_mla import plugin as mla
from deepwright_mla.latent_attention import LatentAttention, MLAConfig, build_mla

HIDDEN, LATENT, ROPE, BLOCK = 20, 10, 4, 4
YARN = RopeConfig(yarn=YarnConfig(factor=4, original_positions=8))


def build(rope: RopeConfig, **sizes: Any) -> LatentAttention:
    values = {"heads": 3, "kv_lora_rank": LATENT, "qk_nope_head_dim": 6, "qk_rope_head_dim": ROPE, "v_head_dim": 5}
    config = MLAConfig(**{**values, **sizes})
    model = ModelConfig(
        hidden_size=HIDDEN,
        layers=1,
        intermediate_size=4,
        rope=rope,
        attention=config.model_dump(),
        ffn={"name": "dense"},
    )
    torch.manual_seed(0)
    attention = build_mla(config, model, 0)
    torch.nn.init.uniform_(attention.kv_norm.weight, 0.5, 1.5)
    return attention


@torch.no_grad()
@pytest.mark.parametrize("rope", [RopeConfig(), YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("queries", [1, 3])
def test_it_gives_and_caches_what_extend_does(rope: RopeConfig, queries: int) -> None:
    attention = build(rope)
    form = attention.few_rows_form()
    assert form is not None
    blocks_BP = torch.tensor([[3, 0, 0], [2, 9, 4], [7, 1, 0]])
    lengths_B = torch.tensor([queries, 11, 7])
    positions_BQ = lengths_B[:, None] - queries + torch.arange(queries)
    slots_BQ = blocks_BP.gather(1, positions_BQ // BLOCK) * BLOCK + positions_BQ % BLOCK
    batch = CacheBatch(positions_BQ, slots_BQ, blocks_BP, lengths_B, BLOCK)
    cache_NW = torch.randn(10 * BLOCK, LATENT + ROPE)
    angles = Rotary(ROPE, rope, 32)(positions_BQ)
    x_BQD = torch.randn(3, queries, HIDDEN)

    want_cache_NW = cache_NW.clone()
    want_BQD = attention.extend(x_BQD, angles, want_cache_NW, batch)
    have_TD: Tensor = form(x_BQD.flatten(0, 1), cache_NW, Shared(angles, batch))
    torch.testing.assert_close(have_TD.view_as(want_BQD), want_BQD, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cache_NW, want_cache_NW, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_is_cached_beyond_the_end_never_counts() -> None:
    registry = Registry()
    core.deepwright_register(registry)
    mla.deepwright_register(registry)
    sizes = {"heads": 3, "kv_lora_rank": LATENT, "qk_nope_head_dim": 6, "qk_rope_head_dim": ROPE, "v_head_dim": 5}
    config = ModelConfig(
        vocab_size=30,
        hidden_size=HIDDEN,
        layers=2,
        intermediate_size=8,
        max_positions=32,
        init_std=0.3,
        attention={"name": "mla", **sizes},
        ffn={"name": "dense"},
    )
    model = build_model(registry, config, seed=0).eval()
    few_rows = model.few_rows_form()
    assert few_rows is not None
    batch = CacheBatch(
        torch.tensor([[5]]), torch.tensor([[2 * BLOCK + 1]]), torch.tensor([[1, 2]]), torch.tensor([6]), BLOCK
    )
    cache = [torch.randn(3 * BLOCK, LATENT + ROPE) for _ in range(2)]
    cache[0][2 * BLOCK + 2] = float("nan")
    tokens = torch.tensor([[7]])
    want = model.extend(tokens, [layer_NW.clone() for layer_NW in cache], batch)
    torch.testing.assert_close(few_rows.extend(tokens, cache, batch), want, rtol=1e-5, atol=1e-6)
    assert want.isfinite().all()


def test_attention_that_has_no_such_form() -> None:
    assert build(RopeConfig(), q_lora_rank=7).few_rows_form() is None
    assert build(RopeConfig(), kv_lora_rank=11).few_rows_form() is None
    assert build(RopeConfig(), heads=64, kv_lora_rank=512).few_rows_form() is None
