"""New rows for new tokens: the mean of the old ones, while nothing else of the model changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.model.vocabulary import grow_vocabulary
from deepwright_core.registry import Registry


def build(registry: Registry, **changes: Any) -> Transformer:
    config = ModelConfig(
        vocab_size=20,
        hidden_size=8,
        layers=1,
        intermediate_size=12,
        init_std=0.3,
        mtp={"depth": 1},
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4},
        ffn={"name": "dense"},
        **changes,
    )
    return build_model(registry, config, seed=0)


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_and_old_ones_as_they_were(registry: Registry, tied: bool) -> None:
    model, before = build(registry, tied_head=tied), build(registry, tied_head=tied)
    assert grow_vocabulary(model, 23) == 3
    assert model.config.vocab_size == 23 and model.head.out_features == 23
    assert (model.head.weight is model.embedding.weight) == tied
    for part in ("embedding", "head"):
        weight_VD, old_VD = getattr(model, part).weight, getattr(before, part).weight
        assert weight_VD.shape == (23, 8) and weight_VD.requires_grad
        assert torch.equal(weight_VD[:20], old_VD)
        torch.testing.assert_close(weight_VD[20:], old_VD.mean(0).expand(3, -1))
    assert model.embedding.num_embeddings == 23
    tokens = torch.randint(20, (2, 7))
    with torch.no_grad():
        logits = model.logits(model(tokens))
        assert torch.equal(logits[..., :20], before.logits(before(tokens)))
        torch.testing.assert_close(logits[..., 20], logits[..., :20].mean(-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [20, 17])
def test_enough_rows_stay_as_they_are(registry: Registry, size: int) -> None:
    model = build(registry)
    embedding, head, config = model.embedding, model.head.weight, model.config
    assert grow_vocabulary(model, size) == 0
    assert model.embedding is embedding and model.head.weight is head and model.config is config


@pytest.mark.parametrize("tied", [False, True])
def test_a_grown_model_is_saved_and_read_and_learns(registry: Registry, tmp_path: Path, tied: bool) -> None:
    model = build(registry, tied_head=tied)
    grow_vocabulary(model, 21)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, registry)
    assert loaded.config.vocab_size == 21 and torch.equal(loaded.head.weight, model.head.weight)
    loaded.logits(loaded(torch.tensor([[20, 3]])))[0, 0, 20].backward()
    assert loaded.embedding.weight.grad is not None and loaded.embedding.weight.grad[20].any()
