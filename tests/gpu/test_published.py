"""A published-format model on a GPU: logits and greedy tokens as transformers has them, through our kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.huggingface import from_published
from deepwright_core.model.transformer import Transformer
from deepwright_core.plugins import installed
from deepwright_kernels import backend_for

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]

VOCABULARY, POSITIONS = 4096, 512


@pytest.fixture(scope="module")
def both() -> tuple[Any, Transformer]:
    """Their model and ours: DeepSeek-V2-Lite's attention, V3's router, YaRN beyond its original length."""
    config = transformers.DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=256,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        n_routed_experts=32,
        num_experts_per_tok=4,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.05,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": POSITIONS // 4,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        bos_token_id=0,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    torch.manual_seed(0)
    theirs = transformers.DeepseekV3ForCausalLM(config).eval()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(-0.1, 0.1)
        if name.endswith("gate_up_proj"):
            for expert, (gate, up) in enumerate(part.chunk(2) for part in tensor):
                tensors[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate
                tensors[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for expert, part in enumerate(tensor):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = part
        else:
            tensors[name] = tensor
    document = {**config.to_dict(), "model_type": "deepseek_v3", "num_nextn_predict_layers": 0}
    ours = from_published(installed().registry, document, tensors).eval()
    return theirs.cuda(), ours.cuda()


@torch.no_grad()
def test_logits_in_float32(both: tuple[Any, Transformer]) -> None:
    theirs, ours = both
    tokens = torch.randint(VOCABULARY, (2, 400), generator=torch.Generator().manual_seed(1)).cuda()
    expected, found = theirs(tokens).logits, ours.logits(ours(tokens))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def test_greedy_tokens_through_the_latent_cache(both: tuple[Any, Transformer]) -> None:
    theirs, ours = both
    assert backend_for("mla_paged_decode", torch.zeros(1, device="cuda")) in {"cuda", "triton"}
    draw = torch.Generator().manual_seed(2)
    prompts = [torch.randint(VOCABULARY - 1, (length,), generator=draw).tolist() for length in (3, 64, 130, 301)]
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    answers = Engine(ours, VOCABULARY - 1, block_size=64, cache_tokens=4096).generate(prompts, [params] * len(prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        whole = theirs.generate(
            torch.tensor([prompt]).cuda(), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
        )
        assert list(answer.token_ids) == whole[0, len(prompt) :].tolist()


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_theirs(both: tuple[Any, Transformer]) -> None:
    theirs, ours = both
    tokens = torch.randint(VOCABULARY, (4, 256), generator=torch.Generator().manual_seed(3)).cuda()
    exact = theirs(tokens).logits
    with torch.autocast("cuda", torch.bfloat16):
        their_error = (theirs(tokens).logits.float() - exact).norm()
        our_error = (ours.logits(ours(tokens)) - exact).norm()
    assert our_error <= 1.25 * their_error
