"""Greedy tokens are transformers' in every way that an engine can come to them, and so is what its cache holds.

The ways: whole prompts and chunks of them, cached prefixes, preemption, and drafts of one to three MTP modules.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.huggingface import from_published
from deepwright_core.model.transformer import Transformer

from .published_models import LATENT, difference, random_tokens, registry, transformers
from .published_mtp import LAYERS, published

GENERATED = 12
LENGTHS = (1, 2, 9, 16, 21, 30)
WAYS: dict[str, dict[str, int]] = {
    "plain": {},
    "chunks": {"block_size": 4, "max_prefill_tokens": 5},
    "a cache that is too small": {"block_size": 4, "cache_tokens": 96},
    "all at once": {"block_size": 2, "cache_tokens": 64, "max_prefill_tokens": 7, "max_batch": 5},
}


@functools.cache
def pair(depth: int) -> tuple[Any, Any, Transformer, list[list[int]]]:
    """Main model and modules of transformers, ours, and the greedy answers of theirs: each prompt alone."""
    main, modules, document, tensors = published(depth)
    answers = []
    for prompt in prompts():
        tokens_BS = torch.tensor([prompt])
        # The mask, or they would take every 0 in the prompt for padding.
        options = {"attention_mask": torch.ones_like(tokens_BS), "pad_token_id": 0}
        whole_BS = main.generate(tokens_BS, do_sample=False, max_new_tokens=GENERATED, **options)
        answers.append(whole_BS[0, len(prompt) :].tolist())
    return main, modules, from_published(registry(), document, tensors), answers


def prompts() -> list[list[int]]:
    """Unequal ones that begin alike."""
    trunk = random_tokens(1, max(LENGTHS), seed=3)[0].tolist()
    return [
        trunk[: length - length // 4] + random_tokens(1, length // 4, seed=length)[0].tolist() for length in LENGTHS
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("depth", "drafts"), [(1, 0), (1, 1), (1, 3), (2, 2), (3, 3)])
def test_greedy_tokens(way: str, depth: int, drafts: int) -> None:
    *_, ours, answers = pair(depth)
    engine = Engine(ours, 0, speculate=drafts, **WAYS[way])
    params = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
    for _ in range(2):  # the second time with what the first left in the cache
        assert [completion.token_ids for completion in engine.generate(prompts(), params)] == answers
    stats = engine.stats
    assert stats.cached_prompt_tokens > 0
    assert (stats.preemptions > 0) == ("cache_tokens" in WAYS[way])
    assert stats.cache_blocks_used == 0


@pytest.mark.parametrize("depth", [1, 3])
@torch.no_grad()
def test_the_modules_entries_are_theirs(depth: int) -> None:
    """After decoding with drafts, a module's cache is what their module caches of the whole text. Their rope keys are
    turned for another position, which no score sees: the latents are compared."""
    main, modules, ours, answers = pair(depth)
    prompt = prompts()[-1]
    engine = Engine(ours, 0, block_size=128, cache_tokens=128, speculate=depth, max_prefill_tokens=11)
    params = SamplingParams(max_tokens=GENERATED, temperature=0.0, ignore_eos=True)
    assert engine.generate([prompt], [params])[0].token_ids == answers[-1]
    for number, want_LC in enumerate(their_latents(main, modules, torch.tensor([prompt + answers[-1]]))):
        have_LC = engine._runner.cache[LAYERS + number][128 : 128 + len(want_LC), : LATENT["kv_lora_rank"]]
        assert difference(have_LC, want_LC) < 1e-5, number


def their_latents(main: Any, modules: Any, tokens_BS: Tensor) -> list[Tensor]:
    """What each of their modules caches of a text, [L, C]."""
    hidden_BSD = main.model(tokens_BS).last_hidden_state
    cache = transformers.cache_utils.MtpCache(config=main.config.get_mtp_config())
    for k in range(len(modules.layers)):
        length = tokens_BS.shape[1] - 1 - k
        places_BS = torch.arange(k + 1, k + 1 + length)[None]
        hidden_BSD = modules.forward_layer(k, hidden_BSD[:, :length], places_BS, cache, input_ids=tokens_BS[:, k + 1 :])
    return [layer.keys[0, 0] for layer in cache.layers]
