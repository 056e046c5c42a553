"""Other weights in the place of those there are, while requests are under way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model, weights
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry

GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
PROMPT = list(range(3, 23))


def model_with(registry: Registry, seed: int, width: int = 32) -> Transformer:
    config = ModelConfig(
        vocab_size=48,
        hidden_size=width,
        layers=2,
        intermediate_size=48,
        max_positions=64,
        init_std=0.3,
        tied_head=True,
        attention={"name": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8},
        ffn={"name": "dense"},
    )
    return build_model(registry, config, seed=seed).eval()


@pytest.mark.parametrize("by_name", [False, True])
def test_requests_under_way_go_on_with_the_new_weights(registry: Registry, tmp_path: Path, by_name: bool) -> None:
    first, second = model_with(registry, 0), model_with(registry, 1)
    save_model(second, tmp_path / "second")
    engine = Engine(first, 0, block_size=4, cache_tokens=256)
    engine.generate([PROMPT], GREEDY)
    addresses = [parameter.data_ptr() for parameter in first.parameters()]
    engine.add(PROMPT, GREEDY)
    tokens = [event.token_id for _ in range(4) for event in engine.step()]
    engine.load_weights(weights(second) if by_name else tmp_path / "second")
    while engine.has_work:
        tokens += [event.token_id for event in engine.step()]
    assert [parameter.data_ptr() for parameter in first.parameters()] == addresses

    want = model_with(registry, 0)
    context = list(PROMPT)
    for number, token in enumerate(tokens):
        if number == 4:
            want = second
        with torch.no_grad():
            assert token == int(want.logits(want(torch.tensor([context]))[0, -1]).argmax()), number
        context.append(token)
    fresh = Engine(second, 0, block_size=4, cache_tokens=256).generate([PROMPT], GREEDY)[0]
    again = engine.generate([PROMPT], GREEDY)[0]
    assert again.token_ids == fresh.token_ids != tokens
    assert engine.stats.cache_blocks_used == 0


def test_a_state_dict_may_name_a_tied_tensor_twice(registry: Registry) -> None:
    second = model_with(registry, 1)
    engine = Engine(model_with(registry, 0), 0, block_size=4, cache_tokens=256)
    assert set(second.state_dict()) > set(weights(second))
    engine.load_weights(second.state_dict())
    fresh = Engine(second, 0, block_size=4, cache_tokens=256).generate([PROMPT], GREEDY)[0]
    assert engine.generate([PROMPT], GREEDY)[0].token_ids == fresh.token_ids
    other = second.state_dict() | {"head.weight": torch.zeros(48, 32)}
    with pytest.raises(RequestError, match=r"'head.weight' belongs to no parameter"):
        engine.load_weights(other)


def test_weights_of_another_shape_change_nothing(registry: Registry, tmp_path: Path) -> None:
    model = model_with(registry, 0)
    engine = Engine(model, 0, block_size=4, cache_tokens=256)
    before = engine.generate([PROMPT], GREEDY)[0]
    save_model(model_with(registry, 1, width=40), tmp_path / "wide")
    with pytest.raises(RequestError, match=r"'embedding.weight' has shape \[48, 40\]; the model wants \[48, 32\]"):
        engine.load_weights(tmp_path / "wide")
    given = weights(model_with(registry, 1))
    del given["norm.weight"]
    with pytest.raises(RequestError, match=r"the given weights: 'norm.weight' is missing"):
        engine.load_weights(given | {"nowhere": torch.zeros(1)})
    again = engine.generate([PROMPT], GREEDY)[0]
    assert (again.token_ids, again.cached_tokens) == (before.token_ids, 16)
