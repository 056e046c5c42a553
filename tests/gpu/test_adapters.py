"""Adapters on a GPU, in bfloat16 and through CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.finetune import adapter_files
from deepwright_core.finetune.lora import Lora, LoraConfig
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import installed
from deepwright_core.registry import parse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

VALUES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "layers": 3,
    "intermediate_size": 384,
    "first_dense_layers": 1,
    "max_positions": 512,
    "init_std": 0.08,
    "attention": {
        "name": "mla",
        "heads": 4,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    },
    "ffn": {"name": "moe", "experts": 8, "top_k": 2, "intermediate_size": 128, "router": {"name": "noaux_tc"}},
}
CONFIGS = {
    "one": LoraConfig(rank=8, alpha=16.0),
    "two": LoraConfig(rank=5, alpha=5.0, targets=["attention", "ffn", "head"]),
}
PROMPTS = [[(11 * i + 3 * j) % 509 for j in range(length)] for i, length in enumerate((5, 70, 33, 200))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Transformer]]:
    """The base and the merged models on the GPU in bfloat16; the adapters lie beside the base."""
    registry = installed().registry
    base = tmp_path_factory.mktemp("adapters") / "base"
    save_model(build_model(registry, parse(ModelConfig, VALUES, "model", registry), seed=0), base)
    merged = {"": load_model(base, registry, "cuda", torch.bfloat16)}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        model = load_model(base, registry)
        lora = Lora(config, model, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for tensor in lora.factors().values():
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.05
        adapter_files.write(base.parent / name, config, lora.originals(), lora.factors())
        lora.merge()
        merged[name] = model.to("cuda", torch.bfloat16)
    return base, merged


@pytest.mark.parametrize("graphs", ["off", "auto"])
def test_a_mixed_batch_is_near_the_merged_models(models: tuple[Path, dict[str, Transformer]], graphs: Any) -> None:
    """bfloat16 rounds a sum of weights and a sum of products differently: probabilities are compared, not tokens."""
    base, merged = models
    engine = Engine(merged[""], 0, cache_tokens=8192, max_batch=32, graphs=graphs)
    for name in CONFIGS:
        engine.load_adapter(name, base.parent / name, base)
    params = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True)
    ids = {engine.add(p, params, adapter=name): (name, n) for n, p in enumerate(PROMPTS) for name in merged}
    tokens: dict[Any, list[int]] = {key: [] for key in ids.values()}
    logprobs: dict[Any, list[float]] = {key: [] for key in ids.values()}
    while engine.has_work:
        for event in engine.step():
            assert event.token_id is not None
            tokens[ids[event.request_id]].append(event.token_id)
            logprobs[ids[event.request_id]].append(event.logprob)
    if graphs == "auto":
        assert engine._runner._graphs is not None and engine._runner._graphs.refusal is None
    for name in CONFIGS:
        engine.drop_adapter(name)

    for (name, number), answer in tokens.items():
        errors = {}
        for other, model in merged.items():
            ids_1S = torch.tensor([PROMPTS[number] + answer], device="cuda")
            with torch.no_grad():
                logits = model.logits(model(ids_1S)[0, len(PROMPTS[number]) - 1 : -1])
            want = logits.log_softmax(-1).gather(1, ids_1S[0, len(PROMPTS[number]) :, None])[:, 0].cpu()
            errors[other] = float((want - torch.tensor(logprobs[name, number])).abs().mean())
        assert errors[name] < 0.1 and all(errors[name] < 0.5 * errors[o] for o in errors if o != name), errors
