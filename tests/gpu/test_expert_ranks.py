"""Experts on two GPUs, which talk by NCCL, against the same model on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.parallel.experts import load_share
from deepwright_core.parallel.leading import Followers, LeadingModel
from deepwright_core.parallel.ranks import Ranks
from deepwright_core.plugins import installed
from deepwright_core.registry import parse

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

VALUES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "layers": 4,
    "intermediate_size": 384,
    "first_dense_layers": 1,
    "max_positions": 1024,
    "init_std": 0.1,
    "attention": {
        "name": "mla",
        "heads": 8,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 64,
    },
    "ffn": {"name": "moe", "experts": 8, "top_k": 2, "intermediate_size": 128, "router": {"name": "noaux_tc"}},
}


def test_two_gpus_generate_what_one_does(tmp_path: Path) -> None:
    registry = installed().registry
    save_model(build_model(registry, parse(ModelConfig, VALUES, "model", registry), seed=0), tmp_path / "model")
    prompts = [[(7 * i + 3 * j) % 509 for j in range(length)] for i, length in enumerate((5, 200, 64, 1, 130))]
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    device = torch.device("cuda", 0)
    alone = Engine(load_model(tmp_path / "model", registry, device), 0, cache_tokens=8192).generate(prompts, params)

    meeting = tmp_path / "meeting"
    followers = Followers(tmp_path / "model", 2, meeting, device, torch.float32, torch.get_num_threads())
    try:
        ranks = Ranks.join(0, 2, meeting, device, followers.look)
        model = LeadingModel(load_share(tmp_path / "model", registry, ranks, device, torch.float32), ranks)
        engine = Engine(model, 0, cache_tokens=8192, graphs="off")
        for _ in range(2):  # the second time from the prefix cache
            together = engine.generate(prompts, params)
            assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
        model.leave()
    finally:
        followers.end()
    assert followers.loss is None
