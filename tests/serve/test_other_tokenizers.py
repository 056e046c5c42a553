"""Models that came with tokenizers and templates of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from deepwright_core.tokenizer import Conventions, Tokenizer
from deepwright_serve.service import Service

from .conftest import ScriptedEngine, service_of


def serve(tokenizer: Tokenizer, serve_service: Callable[[Service], Any], says: str) -> Any:
    engine = ScriptedEngine(lambda prompt: tokenizer.encode(says, allow_special=True), min(tokenizer.end_ids))
    return serve_service(service_of(engine, tokenizer))


@pytest.fixture
def bare(tokenizer: Tokenizer) -> Tokenizer:
    """The same vocabulary with no mark of a conversation, and nothing before a text."""
    document = json.loads(tokenizer.source)
    kept = [t for t in document["added_tokens"] if t["id"] == tokenizer.eos_id]
    lost = {t["content"] for t in document["added_tokens"]} - {t["content"] for t in kept}
    document["model"]["vocab"] = {t: i for t, i in document["model"]["vocab"].items() if t not in lost}
    return Tokenizer(json.dumps(document | {"added_tokens": kept, "post_processor": None}))


def test_a_template_whose_prompt_opens_the_thinking(
    tokenizer: Tokenizer, serve_service: Callable[[Service], Any]
) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}<｜Assistant｜><think>\n{{ '\n' }}"
    )
    own = Tokenizer(tokenizer.source, Conventions(template=template))
    with serve(own, serve_service, "hm</think>42") as server:
        message = server.chat("2 + 40?").json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "42")


def test_a_tokenizer_without_the_chat_form_completes_texts(
    bare: Tokenizer, serve_service: Callable[[Service], Any]
) -> None:
    with serve(bare, serve_service, "42") as server:
        refused = server.chat("2 + 40?")
        assert refused.status_code == 400
        assert "has no <｜begin▁of▁sentence｜>, <｜User｜>, <｜Assistant｜>" in refused.json()["error"]["message"]
        reply = server.client.post("/v1/completions", json={"model": "tiny", "prompt": "The answer is"})
        assert reply.json()["choices"][0]["text"] == "42"
        prompt, params, _ = server.engine.asked[-1]
        assert (prompt, params.stop_ids) == (bare.encode("The answer is"), ())
        assert server.client.get("/health").status_code == 200
