"""A server whose engine speculates gives the answers of one that does not, several tokens at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core import plugins
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.limits import Limits
from deepwright_serve.loading import Loading
from deepwright_serve.roster import Roster
from deepwright_serve.service import Service

REQUESTS: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 24},
    {"temperature": 0.9, "seed": 3, "max_tokens": 24, "top_p": 0.9},
    {"temperature": 0.9, "seed": 4, "max_tokens": 24, "n": 3},
    {"temperature": 0, "max_tokens": 24, "logprobs": 2},
    {"temperature": 0, "max_tokens": 24, "frequency_penalty": 1.0},
]


@pytest.fixture
def drafting(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model in which a token says most of what the next one is, so that its module is often right."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        layers=1,
        intermediate_size=32,
        max_positions=512,
        mtp={"depth": 1},
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 16},
        ffn={"name": "dense"},
    )
    model = build_model(plugins.installed().registry, config, seed=0).double()
    with torch.no_grad():
        model.embedding.weight.mul_(40)
        model.head.weight.mul_(20)
        model.mtp[0].projection.weight[:, :32] += torch.eye(32)  # type: ignore[union-attr, index]
    save_model(model.float(), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def streamed(client: Any, body: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Text and ending of each choice."""
    texts: dict[int, tuple[str, str | None]] = {}
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply:
        for line in reply.iter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text, reason = texts.get(choice["index"], ("", None))
                texts[choice["index"]] = (text + choice["text"], choice["finish_reason"] or reason)
    return [texts[index] for index in sorted(texts)]


@pytest.mark.costly
def test_answers_are_the_same_whole_and_streamed(drafting: Path, serve_service: Callable[[Service], Any]) -> None:
    answers: dict[int, list[Any]] = {}
    for drafts in (0, 3):
        served = Loading(device="cpu", cache_tokens=512, speculate=drafts).load(drafting, "tiny")
        with serve_service(Service(Roster([served]), Limits())) as server:
            whole = []
            for request in REQUESTS:
                body = {"model": "tiny", "prompt": "What is 17", **request}
                reply = server.client.post("/v1/completions", json=body).json()
                texts = [(choice["text"], choice["finish_reason"]) for choice in reply["choices"]]
                assert streamed(server.client, body) == texts
                whole.append((texts, reply["usage"]["completion_tokens"]))
            stop = whole[0][0][0][0][4:7]
            body = {"model": "tiny", "prompt": "What is 17", **REQUESTS[0], "stop": stop}
            ended = server.client.post("/v1/completions", json=body).json()["choices"][0]
            whole.append((ended["text"], ended["finish_reason"]))
            answers[drafts] = whole
            lines = server.client.get("/metrics").text.splitlines()
            counted = [line for line in lines if line.startswith("vllm:spec")]
            counts = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in counted}
            drafted, accepted = (
                counts[f"vllm:spec_decode_num_{which}_tokens_total"] for which in ("draft", "accepted")
            )
            assert (0 < accepted < drafted) if drafts else (accepted == drafted == 0)
    assert answers[0] == answers[3]
    assert answers[0][-1][1] == "stop"


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_modules_are_part_of_what_a_model_will_take(drafting: Path, drafts: int) -> None:
    loading = Loading(device="cpu", cache_tokens=512, speculate=drafts)
    (replica,) = loading.load(drafting, "tiny").thread.replicas
    engine = replica._engine  # type: ignore[attr-defined]
    cached = sum(layer_NW[16:].numel() for layer_NW in engine._runner.cache)  # without the padding's block
    assert len(engine._runner.cache) == (2 if drafts else 1)
    assert loading.bytes_of(drafting) == 4 * (sum(p.numel() for p in engine.model.parameters()) + cached)
