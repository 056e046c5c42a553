"""Speculative decoding through CUDA graphs: the tokens of plain decoding, whatever joins, leaves and is preempted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepwright_core.engine import Completion, Engine, SamplingParams
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import installed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]

VOCABULARY = 64
MLA = {"name": "mla", "heads": 4, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64}
GQA = {"name": "gqa", "heads": 4, "kv_heads": 2, "head_dim": 64}
SHAPES: dict[str, dict[str, int]] = {
    "plain": {"max_batch": 16, "cache_tokens": 16 * 256},
    "everything": {"block_size": 16, "max_batch": 13, "cache_tokens": 18 * 16, "max_prefill_tokens": 100},
}
SAMPLED = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.95, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)


def model(attention: dict[str, Any], depth: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """A model whose module mostly guesses right: a token says nearly everything about the next one."""
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        layers=3,
        intermediate_size=512,
        first_dense_layers=1,
        max_positions=2048,
        init_std=0.03,
        mtp={"depth": depth},
        attention=attention,
        ffn={"name": "moe", "experts": 32, "top_k": 4, "intermediate_size": 128},
    )
    built = build_model(installed().registry, config, seed=0)
    with torch.no_grad():
        built.embedding.weight.mul_(33)
        built.head.weight.mul_(7)
        for module in built.mtp:
            module.projection.weight.mul_(0.2)  # type: ignore[union-attr, operator]
            module.projection.weight[:, :256] += torch.eye(256)  # type: ignore[union-attr, index]
    return built.to("cuda", dtype).eval()


def prompts(count: int, longest: int = 60) -> list[list[int]]:
    draw = torch.Generator().manual_seed(count)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    trunk = torch.randint(VOCABULARY, (longest,), generator=draw).tolist()
    return [
        trunk[: length // 2] + torch.randint(VOCABULARY, (length - length // 2,), generator=draw).tolist()
        for length in lengths
    ]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


@pytest.mark.parametrize(("attention", "depth"), [(MLA, 1), (MLA, 2), (GQA, 1)], ids=["mla-1", "mla-2", "gqa-1"])
def test_tokens_are_those_of_plain_decoding(attention: dict[str, Any], depth: int) -> None:
    """In float32, where a call with more queries gives the same tokens. Greedy and sampled rows in one batch."""
    exact = model(attention, depth)
    kinds = [vars(GREEDY), vars(SAMPLED)]
    wanted = [SamplingParams(**{**kinds[i % 2], "max_tokens": 40 - i % 11, "seed": i}) for i in range(21)]
    want = tokens(Engine(exact, 0, graphs="off").generate(prompts(21), wanted))
    for drafts, (name, shape) in zip((3, 1 + depth), SHAPES.items(), strict=True):
        engine = Engine(exact, 0, speculate=drafts, graphs="off" if name == "plain" and depth == 2 else "auto", **shape)
        for _ in range(2):  # the second time over cached prefixes
            assert tokens(engine.generate(prompts(21), wanted)) == want
        stats = engine.stats
        assert stats.cache_blocks_used == 0
        assert (stats.preemptions > 0) == (name == "everything")
        assert 0.3 * stats.draft_tokens < stats.accepted_tokens < stats.draft_tokens


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_bfloat16_runs_and_mostly_agrees(cache_dtype: Any) -> None:
    """Rounding differs with the number of queries, so a few answers may part; no more than with other batches."""
    served = model(MLA, 1, torch.bfloat16)
    plain, speculating = (
        Engine(served, 0, speculate=drafts, cache_dtype=cache_dtype, max_batch=16, cache_tokens=16 * 256)
        for drafts in (0, 2)
    )
    want, have = (tokens(engine.generate(prompts(16), GREEDY)) for engine in (plain, speculating))
    same = sum(a == b for a, b in zip(want, have, strict=True))
    assert same >= 12
    assert speculating.stats.accepted_tokens > 0.3 * speculating.stats.draft_tokens
    assert speculating._runner._graphs is not None and speculating._runner._graphs.refusal is None


def test_graphs_of_a_speculating_engine_survive_new_weights() -> None:
    exact = model(MLA, 1)
    engine = Engine(exact, 0, speculate=3, max_batch=8, cache_tokens=4096)
    engine.generate(prompts(8), GREEDY)
    with torch.no_grad():
        exact.head.weight.copy_(exact.head.weight.flip(0))
    engine.update_weights()
    want = tokens(Engine(exact, 0, graphs="off", max_batch=8, cache_tokens=4096).generate(prompts(8), GREEDY))
    assert tokens(engine.generate(prompts(8), GREEDY)) == want
