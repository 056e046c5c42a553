"""Speculative decoding: the same tokens as without, from fewer steps."""

from __future__ import annotations

import random
from typing import Any

import pytest

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry

VOCABULARY = 12
SHAPES: dict[str, dict[str, int]] = {
    "plain": {},
    "chunked": {"block_size": 4, "max_prefill_tokens": 7},
    "tiny cache": {"block_size": 2, "cache_tokens": 60, "max_batch": 6},
    "one token a block and chunk": {"block_size": 1, "cache_tokens": 60, "max_prefill_tokens": 1},
}


def build(registry: Registry, depth: int) -> Transformer:
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        layers=2,
        intermediate_size=24,
        max_positions=48,
        init_std=0.3,
        mtp={"depth": depth},
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 8},
        ffn={"name": "dense"},
    )
    return build_model(registry, config, seed=0).double()  # so that rounding never decides a token


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    trunk = [draw.randrange(VOCABULARY) for _ in range(14)]
    return [[1]] + [
        trunk[: draw.randrange(1, 15)] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(8))]
        for _ in range(7)
    ]


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8},
    "truncated": {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
}


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", PARAMS)
def test_tokens_are_those_of_plain_decoding(registry: Registry, depth: int, kind: str) -> None:
    model = build(registry, depth)
    params = [SamplingParams(max_tokens=14, seed=i, ignore_eos=True, **PARAMS[kind]) for i in range(len(prompts()))]
    want = [c.token_ids for c in Engine(model, 0).generate(prompts(), params)]
    for number, shape in enumerate(SHAPES.values()):
        engine = Engine(model, 0, speculate=1 + (number + depth) % 3, **shape)
        for _ in range(2):  # the second time over what the first left in the cache
            assert [c.token_ids for c in engine.generate(prompts(), params)] == want
        stats = engine.stats
        assert stats.cache_blocks_used == 0
        assert 0 < stats.accepted_tokens < stats.draft_tokens


def test_a_model_without_modules_is_refused(registry: Registry) -> None:
    with pytest.raises(RequestError, match="speculate is 1, and the model has no MTP module"):
        Engine(build(registry, 0), 0, speculate=1)
    with pytest.raises(RequestError, match=r"speculate is 4; expected 0 \(off\) to 3"):
        Engine(build(registry, 1), 0, speculate=4)
