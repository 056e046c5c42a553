"""Row by row on a GPU: real sizes, and whole engines, through CUDA graphs too."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import installed
from deepwright_core.registry import parse
from deepwright_kernels import add_rms_norm, rms_norm
from deepwright_kernels.row_by_row import row_by_row
from deepwright_kernels.row_by_row import triton as forms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("inputs", "outputs"), [(2048, 3072), (512, 4096), (2048, 576), (1408, 2048), (2048, 32768)])
def test_products_of_real_sizes(dtype: torch.dtype, inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    x_TK, w_NK = draw(3000, inputs, dtype=dtype), draw(outputs, inputs, dtype=dtype)
    whole = forms.rows(x_TK[None], w_NK.T[None])[0]
    want = x_TK.double() @ w_NK.T.double()
    assert float((whole - want).abs().max() / want.abs().max()) < (0.01 if dtype == torch.bfloat16 else 1e-5)
    for rows in (slice(0, 1), slice(1, 2), slice(77, 78), slice(2990, 3000), slice(5, 300), torch.randperm(3000)):
        assert torch.equal(forms.rows(x_TK[rows][None], w_NK.T[None])[0], whole[rows])


def test_norms_of_any_number_of_rows() -> None:
    torch.manual_seed(0)
    for width in (64, 512, 2048, 7168):
        x, residual, weight = draw(700, width), draw(700, width), draw(width)
        with row_by_row():
            whole, both = rms_norm(x, weight), add_rms_norm(x, residual, weight)
            for rows in (slice(0, 1), slice(13, 14), slice(5, 37)):
                assert torch.equal(rms_norm(x[rows].clone(), weight), whole[rows])
                for one, other in zip(add_rms_norm(x[rows], residual[rows], weight), both, strict=True):
                    assert torch.equal(one, other[rows])


ATTENTIONS: dict[str, dict[str, Any]] = {
    "mla": {
        "name": "mla",
        "heads": 16,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "gqa": {"name": "gqa", "heads": 8, "kv_heads": 2, "head_dim": 64},
}


def model_with(attention: str, dtype: torch.dtype) -> Transformer:
    values = {
        "vocab_size": 4096,
        "hidden_size": 512,
        "layers": 3,
        "intermediate_size": 1024,
        "first_dense_layers": 1,
        "max_positions": 2048,
        "init_std": 0.05,
        "mtp": {"depth": 1},
        "attention": ATTENTIONS[attention],
        "ffn": {
            "name": "moe",
            "experts": 16,
            "top_k": 4,
            "intermediate_size": 256,
            "router": {"name": "noaux_tc", "groups": 4, "top_groups": 2},
        },
    }
    registry = installed().registry
    return build_model(registry, parse(ModelConfig, values, "model", registry), seed=0).to("cuda", dtype).eval()


@pytest.mark.parametrize(
    ("attention", "dtype"), [("mla", torch.bfloat16), ("mla", torch.float32), ("gqa", torch.bfloat16)]
)
def test_company_changes_no_bit(attention: str, dtype: torch.dtype) -> None:
    model = model_with(attention, dtype)
    draws = random.Random(0)
    prompt = [draws.randrange(4096) for _ in range(300)]
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    shapes: list[dict[str, Any]] = [
        {"graphs": "off"},
        {},
        {"max_prefill_tokens": 100},
        {"cache_tokens": 1280},
        {"speculate": 2},
    ]
    alone: list[tuple[int, float]] | None = None
    for number, shape in enumerate(shapes):
        engine = Engine(model, 0, **{"cache_tokens": 16384, "max_batch": 32, **shape}, batch_invariant=True)
        found = []
        for _ in range(2 if number else 1):
            for other in range(0 if number == 0 else 12):
                length = draws.randrange(1, 400)
                engine.add([draws.randrange(4096) for _ in range(length)], SamplingParams(max_tokens=60, seed=other))
            mine = engine.add(prompt, params)
            events = [event for _step in iter(lambda e=engine: e.has_work, False) for event in engine.step()]
            found.append([(e.token_id, e.logprob) for e in events if e.request_id == mine])
        for one in found:
            if alone is None:
                alone = one
                assert len(one) == 40 and len({token for token, _ in one}) > 10
            # The token's own bits are the model's; its log-probability sums a vocabulary in float64.
            assert [token for token, _ in one] == [token for token, _ in alone], shape
            assert max(abs(a - b) for (_, a), (_, b) in zip(one, alone, strict=True)) < 1e-12, shape
        if engine._runner._graphs is not None:
            assert engine._runner._graphs.refusal is None
        if "cache_tokens" in shape:
            assert engine.stats.preemptions > 0
