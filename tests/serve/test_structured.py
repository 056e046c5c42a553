"""Structured answers of a model that says nonsense: whatever it draws, what arrives has the form that was asked for."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from deepwright_core import plugins
from deepwright_core.engine import Engine
from deepwright_core.model.directory import load_model
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve import structured
from deepwright_serve.limits import MAX_WAITING_FORMS
from deepwright_serve.refusal import Refusal
from deepwright_serve.structured import Form, lark_of

from .conftest import Running, running, service_of

SCHEMA = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 0, "maximum": 999},
        "colours": {"type": "array", "items": {"enum": ["red", "blü"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["number", "colours"],
    "additionalProperties": False,
}
NAMED = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
REGEX = r"[a-c]{2}/[0-9]{3}"
TOOLS = [
    {"type": "function", "function": {"name": "paint", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def nonsense(model_directory: Path, tokenizer: Tokenizer) -> Iterator[Running]:
    model = load_model(model_directory, plugins.installed().registry)
    engine = Engine(model, tokenizer.eos_id, cache_tokens=8192, max_batch=8)
    with running(service_of(engine, tokenizer, context=1024)) as server:
        yield server


def is_json(text: str) -> bool:
    jsonschema.validate(json.loads(text), SCHEMA)
    return True


FORMS: list[tuple[dict[str, Any], Callable[[str], Any]]] = [
    ({"response_format": NAMED}, is_json),
    ({"response_format": {"type": "json_schema", "json_schema": {**NAMED["json_schema"], "strict": True}}}, is_json),
    ({"guided_json": SCHEMA}, is_json),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, is_json),
    ({"guided_regex": REGEX}, lambda text: re.fullmatch(REGEX, text)),
    ({"structured_outputs": {"regex": REGEX}}, lambda text: re.fullmatch(REGEX, text)),
    ({"guided_choice": ["yes", "nein", "ü"]}, lambda text: text in ("yes", "nein", "ü")),
    ({"structured_outputs": {"choice": ["yes", "nein"]}}, lambda text: text in ("yes", "nein")),
]


@pytest.mark.parametrize(("fields", "fits"), FORMS)
def test_answers_have_their_form(nonsense: Running, fields: dict[str, Any], fits: Callable[[str], Any]) -> None:
    thinking = {"type": "enabled", "budget_tokens": 3}
    reply = nonsense.chat(n=3, seed=1, max_tokens=200, thinking=thinking, **fields)
    assert reply.status_code == 200, reply.text
    for choice in reply.json()["choices"]:
        assert choice["finish_reason"] == "stop" and fits(choice["message"]["content"]), choice
    # The form begins where the thinking ends.
    assert reply.json()["usage"]["completion_tokens_details"]["reasoning_tokens"] >= 3
    fields = {"max_tokens": 200, "seed": 2, **fields}
    off = nonsense.chat(thinking={"type": "disabled"}, logprobs=True, **fields).json()["choices"][0]
    assert fits(off["message"]["content"]) and off["message"]["reasoning_content"] is None
    written = b"".join(bytes(token["bytes"]) for token in off["logprobs"]["content"]).decode()
    assert written == off["message"]["content"]
    asked = {"model": "tiny", "prompt": "x", **fields}
    completion = nonsense.client.post("/v1/completions", json=asked).json()["choices"][0]
    assert fits(completion["text"])


def test_any_object(nonsense: Running) -> None:
    for seed in range(3):
        fields = {"response_format": {"type": "json_object"}, "thinking": {"type": "disabled"}, "max_tokens": 40}
        choice = nonsense.chat(seed=seed, **fields).json()["choices"][0]
        content = choice["message"]["content"]
        assert content.startswith("{")
        assert choice["finish_reason"] == "length" or isinstance(json.loads(content), dict)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", ["paint", "now"]), ({"type": "function", "function": {"name": "paint"}}, ["paint"])],
)
def test_demanded_calls_are_made(nonsense: Running, choice: Any, names: list[str], stream: bool) -> None:
    for seed in range(3):
        fields = {"thinking": {"type": "disabled"}, "max_tokens": 300, "seed": seed, "parallel_tool_calls": False}
        reply = nonsense.chat(tools=TOOLS, tool_choice=choice, stream=stream, **fields)
        if stream:
            events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
            choices = [choice for event in events for choice in event["choices"]]
            pieces = [piece for c in choices for piece in c["delta"].get("tool_calls", [])]
            calls = [(pieces[0]["function"]["name"], "".join(p["function"]["arguments"] for p in pieces))]
            reason = choices[-1]["finish_reason"]
        else:
            answer = reply.json()["choices"][0]
            made = [call["function"] for call in answer["message"]["tool_calls"]]
            calls, reason = [(call["name"], call["arguments"]) for call in made], answer["finish_reason"]
        assert reason == "tool_calls" and len(calls) == 1
        name, arguments = calls[0]
        assert name in names
        assert is_json(arguments) if name == "paint" else json.loads(arguments) == {}


def test_text_keeps_to_its_form_beside_tools(nonsense: Running) -> None:
    for seed in range(6):
        fields = {"thinking": {"type": "disabled"}, "max_tokens": 300, "seed": seed, "response_format": NAMED}
        message = nonsense.chat(tools=TOOLS, **fields).json()["choices"][0]["message"]
        assert message.get("tool_calls") or is_json(message["content"])


def test_forms_that_cost_too_much_are_refused_quickly(nonsense: Running) -> None:
    nested: dict[str, Any] = {}
    for _ in range(100):
        nested = {"type": "array", "items": nested}
    for field, source in (
        ("guided_json", nested),
        ("guided_json", {"enum": ["x" * 70_000]}),
        ("guided_regex", "(a{1000}){1000}{1000}"),
        ("guided_regex", "[unfinished"),
        ("guided_json", {"$ref": "http://example.org/schema.json"}),
    ):
        error = nonsense.chat(**{field: source}).json()["error"]
        assert error["param"] == field and error["message"].startswith(f"{field}: The "), error
    assert nonsense.chat(max_tokens=2).status_code == 200


def test_forms_are_compiled_once_and_not_more_wait_than_may(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def slowly(tokenizer: Tokenizer, kind: str, source: Any) -> object:
        calls.append(source)
        time.sleep(0.05)
        return object()

    monkeypatch.setattr(structured, "compile_grammar", slowly)

    async def ask() -> list[Any]:
        compiler = structured.Compiler()
        same = [compiler.compile(tokenizer, Form("regex", "a", "f")) for _ in range(4)]
        first = await asyncio.gather(*same)
        others = [compiler.compile(tokenizer, Form("regex", f"b{n}", "f")) for n in range(MAX_WAITING_FORMS + 3)]
        return [first, await asyncio.gather(*others, return_exceptions=True)]

    first, others = asyncio.run(ask())
    # Two may have begun before either was done.
    assert calls.count("a") <= 2 and len(set(map(id, first))) <= 2
    refused = [item for item in others if isinstance(item, Refusal)]
    assert [item.status for item in refused] == [429] * 3


def test_regular_expressions_inside_other_grammars() -> None:
    assert lark_of(Form("regex", r"a/b\/c\\/", "f")) == r"/a\/b\/c\\\//"
    assert lark_of(Form("choice", ["a", 'q"'], "f")) == '"a" | "q\\""'
