"""The writer of the latent cache on a GPU: DeepSeek's sizes, both kinds of cache, a CUDA graph, and the engine."""

from typing import get_args

import pytest
import torch

from deepwright_core import plugin as core
from deepwright_core.engine import CacheDtype, Engine, SamplingParams
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import Registry
from deepwright_kernels import dispatch, latent_cache_write
from deepwright_kernels.mla_paged_decode.reference import unpack_fp8_latents
from deepwright_mla import plugin as mla

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]


@pytest.mark.parametrize("tokens", [1, 100, 5000])
@pytest.mark.parametrize("fp8", [False, True])
def test_deepseeks_sizes(tokens: int, fp8: bool) -> None:
    torch.manual_seed(0)
    kv_TW, weight_C = torch.randn(tokens, 576, device="cuda").bfloat16(), torch.randn(512, device="cuda").bfloat16()
    angle_TF = torch.rand(tokens, 32, device="cuda") * 1000
    slots_T = torch.randperm(2 * tokens, device="cuda")[:tokens]
    width, dtype = (656, torch.uint8) if fp8 else (576, torch.bfloat16)
    have_NW, want_NW = (torch.zeros(2 * tokens, width, device="cuda", dtype=dtype) for _ in range(2))
    arguments = (kv_TW, weight_C, 1e-6, angle_TF.cos(), angle_TF.sin())
    latent_cache_write(*arguments, have_NW, slots_T)
    dispatch.load("latent_cache_write", "reference")(*arguments, want_NW, slots_T)
    if not fp8:
        torch.testing.assert_close(have_NW, want_NW, rtol=0.01, atol=1e-3)
        return
    (have_NC, have_NR), (want_NC, want_NR) = (unpack_fp8_latents(cache, 512) for cache in (have_NW, want_NW))
    torch.testing.assert_close(have_NR, want_NR, rtol=0.01, atol=1e-3)
    torch.testing.assert_close(have_NC, want_NC, rtol=0.13, atol=0.01)
    assert (have_NC == want_NC).float().mean() > 0.99


def test_a_cuda_graph_writes_where_the_slots_say_at_replay() -> None:
    kv_TW, weight_C = torch.randn(4, 576, device="cuda").bfloat16(), torch.ones(512, device="cuda")
    angle_TF, slots_T = torch.rand(4, 32, device="cuda"), torch.arange(4, device="cuda")
    cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
    cache_NW = torch.zeros(10, 576, device="cuda", dtype=torch.bfloat16)
    latent_cache_write(kv_TW, weight_C, 1e-6, cos_TF, sin_TF, cache_NW, slots_T)
    want_TW = cache_NW[:4].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        latent_cache_write(kv_TW, weight_C, 1e-6, cos_TF, sin_TF, cache_NW, slots_T)
    cache_NW.zero_()
    slots_T.add_(5)
    graph.replay()
    assert torch.equal(cache_NW[5:9], want_TW) and not cache_NW[:5].any()


def test_the_engine_answers_from_fp8_latents_nearly_as_from_bfloat16() -> None:
    """Prefill and decode at DeepSeek's widths, against the training form on the tokens that were drawn."""
    registry = Registry()
    core.deepwright_register(registry)
    mla.deepwright_register(registry)
    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        layers=2,
        intermediate_size=512,
        max_positions=512,
        init_std=0.05,
        attention={
            "name": "mla",
            "heads": 16,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        ffn={"name": "dense"},
    )
    model = build_model(registry, config, seed=0).to("cuda", torch.bfloat16)
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 512, (length,), generator=draw).tolist() for length in (3, 70, 200)]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    differences = {}
    for cache_dtype in get_args(CacheDtype):
        engine = Engine(model, 0, block_size=64, cache_tokens=2048, max_prefill_tokens=128, cache_dtype=cache_dtype)
        found = []
        for prompt, completion in zip(prompts, engine.generate(prompts, params), strict=True):
            tokens = torch.tensor([prompt + completion.token_ids], device="cuda")
            with torch.no_grad():
                rows = model.logits(model(tokens)[0, len(prompt) - 1 : -1]).log_softmax(-1)
            want = rows.gather(1, tokens[0, len(prompt) :, None])[:, 0].cpu()
            found.append((torch.tensor(completion.logprobs) - want).abs())
        differences[cache_dtype] = torch.cat(found).mean().item()
    assert differences["auto"] < 0.02 and differences["fp8"] < 0.05, differences
