"""A batch-invariant engine: a request's tokens and log-probabilities are the same bits in any company."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import installed
from deepwright_core.registry import parse

ATTENTIONS: dict[str, dict[str, Any]] = {
    "mla": {
        "name": "mla",
        "heads": 3,
        "q_lora_rank": 8,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
    },
    "gqa": {"name": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 8},
}
PROMPT = [1 + (5 * j + j * j) % 37 for j in range(26)]
GREEDY = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=9, temperature=1.0, top_p=0.9, seed=5, ignore_eos=True)
SHAPES: dict[str, dict[str, int]] = {
    "plain": {},
    "chunked and preempted": {"max_prefill_tokens": 7, "cache_tokens": 56},
    "speculative": {"speculate": 2},
}


def model_with(attention: str, dtype: torch.dtype) -> Transformer:
    values = {
        "vocab_size": 40,
        "hidden_size": 20,
        "layers": 2,
        "intermediate_size": 28,
        "first_dense_layers": 1,
        "max_positions": 96,
        "init_std": 0.3,
        "mtp": {"depth": 1},
        "attention": ATTENTIONS[attention],
        "ffn": {"name": "moe", "experts": 4, "top_k": 2, "intermediate_size": 10, "router": {"name": "noaux_tc"}},
    }
    registry = installed().registry
    return build_model(registry, parse(ModelConfig, values, "model", registry), seed=0).to(dtype).eval()


def answer(engine: Engine, params: SamplingParams, company: Callable[[int], list[list[int]]]) -> list[Any]:
    """(token, log-probability) of each token of PROMPT's answer. company(step): prompts that come at that step."""
    found: list[Any] = []
    mine: int | None = None
    step = 0
    while engine.has_work or mine is None:
        for number, prompt in enumerate(company(step)):
            engine.add(prompt, SamplingParams(max_tokens=14, temperature=1.0, seed=number))
        if step == 2:
            mine = engine.add(PROMPT, params)
        found += [(e.token_id, e.logprob) for e in engine.step() if e.request_id == mine]
        step += 1
    return found


@pytest.mark.parametrize(
    ("attention", "dtype", "params"),
    [("mla", torch.float32, SAMPLED), ("mla", torch.bfloat16, GREEDY), ("gqa", torch.float32, GREEDY)],
)
def test_company_chunks_preemption_and_cached_prefixes_change_no_bit(
    attention: str, dtype: torch.dtype, params: SamplingParams
) -> None:
    model = model_with(attention, dtype)
    alone = answer(Engine(model, 0, block_size=4, cache_tokens=512, batch_invariant=True), params, lambda step: [])
    assert len(alone) == 9
    for number, (name, shape) in enumerate(SHAPES.items()):
        draw = random.Random(number)

        def company(step: int, draw: random.Random = draw) -> list[list[int]]:
            if step > 4:
                return []
            new = [[draw.randrange(40) for _ in range(draw.randrange(1, 30))] for _ in range(draw.randrange(3))]
            return new + ([PROMPT[: draw.randrange(1, 26)]] if draw.random() < 0.3 else [])

        engine = Engine(model, 0, **{"block_size": 4, "cache_tokens": 512, **shape}, batch_invariant=True)
        for repeat in range(2 if name == "plain" else 1):  # the second time the prompt is cached
            assert answer(engine, params, company) == alone, (name, repeat)
        if "cache_tokens" in shape:
            assert engine.stats.preemptions > 0
        if name != "plain":
            continue
        # A prompt that goes on where the answer ended finds blocks that decoding wrote.
        longer = PROMPT + [token for token, _ in alone]
        follow = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        fresh = Engine(model, 0, block_size=4, cache_tokens=512, batch_invariant=True).generate([longer], follow)[0]
        again = engine.generate([longer], follow)[0]
        assert (again.token_ids, again.logprobs) == (fresh.token_ids, fresh.logprobs)
        assert again.cached_tokens > len(PROMPT)


@pytest.mark.parametrize(("attention", "dtype"), [("mla", torch.float32), ("gqa", torch.bfloat16)])
def test_it_computes_what_the_usual_engine_computes(attention: str, dtype: torch.dtype) -> None:
    model = model_with(attention, dtype)
    prompts = [PROMPT, PROMPT[5:9], PROMPT[::-1]]
    usual, invariant = (
        Engine(model, 0, block_size=4, cache_tokens=512, batch_invariant=choice).generate(prompts, GREEDY)
        for choice in (False, True)
    )
    atol = 1e-3 if dtype == torch.float32 else 0.3
    for one, other in zip(usual, invariant, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(one.token_ids, other.token_ids, strict=True)) if a != b), 9)
        assert same == 9 or atol == 0.3
        torch.testing.assert_close(
            torch.tensor(one.logprobs[:same]), torch.tensor(other.logprobs[:same]), atol=atol, rtol=0
        )


def test_a_cache_in_fp8_is_refused() -> None:
    with pytest.raises(RequestError, match="batch_invariant is on and cache_dtype is 'fp8'"):
        Engine(model_with("gqa", torch.float32), 0, cache_dtype="fp8", batch_invariant=True)
