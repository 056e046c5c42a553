"""The engine over a latent cache: prefill expanded, decode absorbed, and the same answers as the training form."""

from __future__ import annotations

import random

import pytest
import torch

from deepwright_core import plugin as core
from deepwright_core.engine import CacheDtype, Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.model.attention import Rope
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry
from deepwright_kernels.mla_paged_decode.reference import pack_fp8_latents, unpack_fp8_latents
from deepwright_mla import plugin as mla
from deepwright_mla.latent_attention import LatentAttention

VOCABULARY = 64
SHAPES: dict[str, dict[str, int]] = {
    "plain": {},
    "chunked": {"block_size": 4, "max_prefill_tokens": 7},
    "tiny cache": {"block_size": 4, "cache_tokens": 60, "max_batch": 6},
}


@pytest.fixture(scope="module", params=[{}, {"q_lora_rank": 12}, {"yarn": True}], ids=["plain", "q_lora", "yarn"])
def model(request: pytest.FixtureRequest) -> Transformer:
    registry = Registry()
    core.deepwright_register(registry)
    mla.deepwright_register(registry)
    options = dict(request.param)
    yarn = {"factor": 4, "original_positions": 16} if options.pop("yarn", False) else None
    sizes = {"heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        layers=2,
        intermediate_size=64,
        max_positions=64,
        init_std=0.3,  # large enough that different contexts give different tokens
        rope={"yarn": yarn},
        attention={"name": "mla", **sizes, **options},
        ffn={"name": "dense"},
    )
    return build_model(registry, config, seed=0)


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    trunk = [draw.randrange(VOCABULARY) for _ in range(14)]
    return [
        trunk[: draw.randrange(1, 15)] + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(8))]
        for _ in range(9)
    ]


@torch.no_grad()
def best(model: Transformer, tokens: list[int]) -> int:
    return int(model.logits(model(torch.tensor([tokens]))[0, -1]).argmax())


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_output_is_that_of_the_training_form(model: Transformer, shape: str) -> None:
    engine = Engine(model, 0, **SHAPES[shape])
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for _ in range(2):  # the second time from the prefix cache
        for prompt, completion in zip(prompts(), engine.generate(prompts(), params), strict=True):
            tokens = list(prompt)
            for token in completion.token_ids:
                assert token == best(model, tokens)
                tokens.append(token)
            assert len(tokens) == len(prompt) + 12
    assert (engine.stats.preemptions > 0) == (shape == "tiny cache")


def test_log_probabilities_are_those_of_the_training_form(model: Transformer) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.8, ignore_eos=True)
    completions = Engine(model, 0, block_size=4, max_prefill_tokens=9).generate(prompts(), params)
    for prompt, completion in zip(prompts(), completions, strict=True):
        tokens = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logits = model.logits(model(tokens)[0, len(prompt) - 1 : -1]) / 0.8
        want = logits.log_softmax(-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=1e-4, rtol=0)


def test_cached_values_do_not_depend_on_how_they_were_computed(model: Transformer) -> None:
    """Whole prefill, chunks, and token-by-token decoding leave the same cache, not only the same tokens."""
    prompt, contents = prompts()[0] + prompts()[1], []
    for prefill in (100, 3, 1):
        engine = Engine(model, 0, block_size=4, cache_tokens=64, max_prefill_tokens=prefill)
        engine.generate([prompt], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
        computed = len(prompt) + 4
        contents.append([layer_NW[4 : 4 + computed].clone() for layer_NW in engine._runner.cache])
    assert [layer_NW.shape[1] for layer_NW in contents[0]] == [16 + 4] * 2
    for other in contents[1:]:
        torch.testing.assert_close(other, contents[0], atol=1e-5, rtol=1e-5)


def test_a_cache_of_fp8_latents_answers_nearly_the_same_from_fewer_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill in chunks and decode over FP8 latents are the training form over latents rounded to FP8, and near it
    over exact ones."""
    registry = Registry()
    core.deepwright_register(registry)
    mla.deepwright_register(registry)
    sizes = {"heads": 4, "kv_lora_rank": 128, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        layers=2,
        intermediate_size=64,
        max_positions=64,
        init_std=0.1,
        attention={"name": "mla", **sizes},
        ffn={"name": "dense"},
    )
    model = build_model(registry, config, seed=0)
    engine = Engine(model, 0, block_size=4, max_prefill_tokens=11, cache_dtype="fp8")
    assert {(layer_NW.dtype, layer_NW.shape[1]) for layer_NW in engine._runner.cache} == {(torch.uint8, 128 + 4 + 8)}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    completions = engine.generate(prompts(), params)

    @torch.no_grad()
    def logprobs() -> torch.Tensor:
        """Of all drawn tokens, in the training form."""
        found = []
        for prompt, completion in zip(prompts(), completions, strict=True):
            tokens = torch.tensor([prompt + completion.token_ids])
            rows = model.logits(model(tokens)[0, len(prompt) - 1 : -1]).log_softmax(-1)
            found.append(rows.gather(1, tokens[0, len(prompt) :, None])[:, 0])
        return torch.cat(found)

    have, exact = torch.tensor([value for c in completions for value in c.logprobs]), logprobs()
    latents = LatentAttention._latents

    def rounded(self: LatentAttention, x_BSD: torch.Tensor, rope: Rope) -> torch.Tensor:
        rows_TW = latents(self, x_BSD, rope)[0]
        packed = pack_fp8_latents(rows_TW[:, : self.latent_dim], rows_TW[:, self.latent_dim :])
        return torch.cat(unpack_fp8_latents(packed, self.latent_dim), -1).to(x_BSD.dtype)[None]

    monkeypatch.setattr(LatentAttention, "_latents", rounded)
    torch.testing.assert_close(have, logprobs(), atol=1e-3, rtol=0)
    assert 1e-3 < (have - exact).abs().mean() < 0.05


def test_an_fp8_cache_needs_whole_groups_of_latents(model: Transformer) -> None:
    with pytest.raises(RequestError, match=r"layers \[0, 1\] has no FP8 cache .*multiple of 128"):
        Engine(model, 0, cache_dtype="fp8")


@pytest.mark.parametrize("cache_dtype", ["auto", "fp8"])
def test_drafts_over_a_latent_cache_change_no_token(cache_dtype: CacheDtype) -> None:
    """Verified absorbed, filled expanded; the modules' layers have a latent cache of the same form."""
    registry = Registry()
    core.deepwright_register(registry)
    mla.deepwright_register(registry)
    sizes = {"heads": 4, "kv_lora_rank": 128, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    config = ModelConfig(
        vocab_size=8,
        hidden_size=32,
        layers=2,
        intermediate_size=64,
        max_positions=64,
        init_std=0.2,
        mtp={"depth": 2},
        attention={"name": "mla", **sizes},
        ffn={"name": "dense"},
    )
    model = build_model(registry, config, seed=0)
    given = [[token % 8 for token in prompt] for prompt in prompts()]
    params = SamplingParams(max_tokens=12, temperature=0.5, ignore_eos=True)
    want = Engine(model, 0, cache_dtype=cache_dtype).generate(given, params)
    for drafts in (1, 3):
        engine = Engine(model, 0, cache_dtype=cache_dtype, speculate=drafts, block_size=4, max_prefill_tokens=11)
        assert len({layer_NW.shape for layer_NW in engine._runner.cache}) == 1
        assert len(engine._runner.cache) == 2 + min(drafts, 2)
        have = engine.generate(given, params)
        assert [completion.token_ids for completion in have] == [completion.token_ids for completion in want]
        assert 0 < engine.stats.accepted_tokens < engine.stats.draft_tokens
