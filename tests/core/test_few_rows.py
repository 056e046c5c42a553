"""A decode step in few calls: the same hidden states, logits and cache as the model's own; where it is not taken; and
that the engine makes it anew when the model is not what it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.model.cache import CacheBatch
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.few_rows import MOST_ROWS, FewRows
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry
from deepwright_kernels import configure
from deepwright_kernels.row_by_row import row_by_row

BLOCK = 4


@pytest.fixture
def model(registry: Registry) -> Transformer:
    config = ModelConfig(
        vocab_size=40,
        hidden_size=24,
        layers=2,
        intermediate_size=20,
        max_positions=32,
        init_std=0.3,
        attention={"name": "gqa", "heads": 3, "kv_heads": 1, "head_dim": 6},
        ffn={"name": "dense"},
    )
    model = build_model(registry, config, seed=0).eval()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(weight, 0.5, 1.5)
    return model


def cached(model: Transformer) -> tuple[list[Tensor], CacheBatch]:
    """Random caches, and two sequences that get two tokens each."""
    draw = torch.Generator().manual_seed(0)
    cache = [torch.randn(10 * BLOCK, width, generator=draw) for width in model.cache_widths]
    lengths_B = torch.tensor([7, 11])
    positions_BQ = lengths_B[:, None] - 2 + torch.arange(2)
    blocks_BP = torch.tensor([[3, 5, 0], [2, 9, 4]])
    slots_BQ = blocks_BP.gather(1, positions_BQ // BLOCK) * BLOCK + positions_BQ % BLOCK
    return cache, CacheBatch(positions_BQ, slots_BQ, blocks_BP, lengths_B, BLOCK)


@torch.no_grad()
def test_it_gives_what_the_model_gives(model: Transformer) -> None:
    few_rows = model.few_rows_form()
    assert few_rows is not None
    tokens_BQ = torch.tensor([[1, 2], [3, 4]])
    (want_cache, batch), (cache, _) = cached(model), cached(model)
    want, have = model.extend(tokens_BQ, want_cache, batch), few_rows.extend(tokens_BQ, cache, batch)
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cache, want_cache, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(few_rows.logits(have[:, 0]), model.logits(want[:, 0]), rtol=1e-5, atol=1e-5)


def test_it_is_for_few_rows_and_no_chosen_backend() -> None:
    assert FewRows.takes(MOST_ROWS)
    assert not FewRows.takes(MOST_ROWS + 1)
    with configure({"rms_norm": "reference"}):
        assert not FewRows.takes(1)
    with configure({"*": "auto"}):
        assert FewRows.takes(1)
    with row_by_row():
        assert not FewRows.takes(1)
    with torch.autocast("cpu"):
        assert not FewRows.takes(1)
    assert FewRows.takes(1)


def test_hooks_and_other_dtypes_have_no_such_form(model: Transformer) -> None:
    handle = model.layers[0].attention.o.register_forward_hook(lambda *_: None)
    assert model.few_rows_form() is None
    handle.remove()
    assert model.few_rows_form() is not None
    assert model.bfloat16().few_rows_form() is None


def test_the_engine_follows_weights_that_change_in_place(model: Transformer) -> None:
    engine, params = Engine(model, 0, cache_tokens=64), SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    before = engine.generate([[1, 2, 3]], params)[0].token_ids
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    engine.update_weights()
    after = engine.generate([[1, 2, 3]], params)[0].token_ids
    assert after == Engine(model, 0, cache_tokens=64).generate([[1, 2, 3]], params)[0].token_ids != before
