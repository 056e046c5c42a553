"""`deepwright serve --expert-parallel 2`: one endpoint over two processes, which answers as one process does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import httpx
import psutil
import pytest

from deepwright_core import plugins
from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import WorkError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import parse
from deepwright_core.tokenizer import Tokenizer
from deepwright_core.tokenizer.bpe import BpeConfig, train
from deepwright_serve import child
from deepwright_serve.answer import Continuation
from deepwright_serve.expert_parallel import over_ranks
from deepwright_serve.loading import Loading


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(BpeConfig(vocab_size=320, min_frequency=2), ["What is 17 + 25? The answer is 42."] * 4)


@pytest.fixture
def mixture(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    values = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 24,
        "layers": 2,
        "intermediate_size": 32,
        "first_dense_layers": 1,
        "max_positions": 256,
        "init_std": 0.3,
        "attention": {
            "name": "mla",
            "heads": 2,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        "ffn": {"name": "moe", "experts": 4, "top_k": 2, "intermediate_size": 16},
    }
    registry = plugins.installed().registry
    save_model(build_model(registry, parse(ModelConfig, values, "model", registry), seed=0), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def test_two_ranks_answer_as_one_process_and_a_lost_rank_ends_the_server(
    mixture: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    options = ["--device", "cpu", "--cache-tokens", "512", "--expert-parallel", "2", "--name", "tiny"]
    server = child.start(mixture, tmp_path / "server", options, port=0, keep=False, limit=120)
    try:
        (follower,) = psutil.Process(server.pid).children()
        assert "deepwright_core.parallel.following" in follower.cmdline()
        engine = Engine(load_model(mixture, plugins.installed().registry), tokenizer.end_ids, cache_tokens=512)
        params = SamplingParams(max_tokens=12, temperature=0)
        prompts = [list(range(3, 3 + length)) for length in (1, 9, 40)]
        with httpx.Client(base_url=server.address, timeout=60, trust_env=False) as client:
            for _ in range(2):  # the second time from the prefix cache
                body = {"model": "tiny", "prompt": prompts, "max_tokens": 12, "temperature": 0}
                choices = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
                want = engine.generate(prompts, params)
                follower.terminate()  # as a service manager does; it is not the follower's to end
                assert [c["text"] for c in choices] == [Continuation.of(tokenizer, w.token_ids).content for w in want]
            client.get("/health").raise_for_status()
            os.kill(follower.pid, signal.SIGKILL)
            assert server.process.wait(30) == 1
    finally:
        server.stop(5)
    assert "Rank 1 of the 2 that share the experts ended with status -9" in server.log.read_text().splitlines()[-1]


def test_nobody_waits_for_a_rank_that_cannot_begin(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with (
        pytest.raises(WorkError, match="Rank 1 of the 2 that share the experts ended with status 1"),
        over_ranks(Loading(device="cpu"), 2, mixture, "tiny", ""),
    ):
        pass
