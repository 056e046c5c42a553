"""The OpenAPI document tells the truth: every reply has the form, the status and the fields that it names."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
CALL = (
    "<think>hm</think>🙂<｜tool▁calls▁begin｜>"
    "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)

# (method, path as the document has it, what fills it, body, status)
CASES: list[tuple[str, str, dict[str, str], Any, int]] = [
    ("get", "/ready", {}, None, 200),
    ("get", "/health", {}, None, 200),
    ("get", "/version", {}, None, 200),
    ("get", "/v1/models", {}, None, 200),
    ("get", "/v1/models/{name}", {"name": "tiny"}, None, 200),
    ("get", "/v1/models/{name}", {"name": "some/other"}, None, 404),
    ("post", CHAT, {}, {"messages": USER}, 200),
    ("post", CHAT, {}, {"messages": USER, "tools": TOOLS, "n": 2}, 200),
    ("post", CHAT, {}, {"messages": USER, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}, 200),
    ("post", CHAT, {}, {"messages": []}, 400),
    ("post", CHAT, {}, {"messages": USER, "model": "other"}, 404),
    ("post", TEXT, {}, {"prompt": ["a", "b"]}, 200),
    ("post", TEXT, {}, {"prompt": "a", "echo": True, "logprobs": 2, "prompt_logprobs": 2}, 200),
    ("post", TEXT, {}, {"prompt": "a", "suffix": "b"}, 400),
    ("post", "/tokenize", {}, {"prompt": "a", "return_token_strs": True}, 200),
    ("post", "/tokenize", {}, {"messages": USER}, 200),
    ("post", "/tokenize", {}, {}, 400),
    ("post", "/detokenize", {}, {"tokens": [100]}, 200),
    ("post", "/detokenize", {}, {"tokens": [-1]}, 400),
]


@pytest.fixture(scope="module")
def document(scripted: Callable[[str], Any]) -> dict[str, Any]:
    return scripted("42").client.get("/openapi.json").json()


def closed(document: dict[str, Any]) -> dict[str, Any]:
    """The document's schemas, with every object closed: a field that they do not name is a lie."""
    components = copy.deepcopy(document["components"])
    for schema in components["schemas"].values():
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
    return components


def check(document: dict[str, Any], schema: dict[str, Any], reply: Any) -> None:
    jsonschema.Draft202012Validator({**schema, "components": closed(document)}).validate(reply)


def test_replies_are_what_the_document_says(scripted: Callable[[str], Any], document: dict[str, Any]) -> None:
    server = scripted(CALL)
    for method, path, fill, body, status in CASES:
        if path in (CHAT, TEXT):
            body = {"model": "tiny"} | body
        reply = server.client.request(method, path.format(**fill), json=body)
        assert reply.status_code == status, (path, body, reply.text)
        declared = document["paths"][path][method]["responses"][str(status)]["content"]
        assert reply.headers["content-type"] in declared
        check(document, declared["application/json"]["schema"], reply.json())
    asked = {(method, path) for method, path, *_ in CASES}
    everything = {(method, path) for path, item in document["paths"].items() for method in item}
    # These answer with text, and are looked at elsewhere.
    assert everything - asked == {("get", "/"), ("get", "/metrics")}


def test_refusals_of_any_route_are_declared(scripted: Callable[[str], Any], document: dict[str, Any]) -> None:
    server = scripted("42")

    def declared(path: str, method: str, reply: Any) -> None:
        assert str(reply.status_code) in document["paths"][path][method]["responses"], (path, reply.status_code)
        schema = document["paths"][path][method]["responses"][str(reply.status_code)]["content"]["application/json"]
        check(document, schema["schema"], reply.json())

    for path, item in document["paths"].items():
        for method in item:
            where = path.format(name="tiny")
            declared(path, method, server.client.request(method, where, headers={"host": "evil.example"}))
            declared(path, method, server.client.request(method, where, headers={"x-padding": "x" * 20_000}))
            if method == "post":
                declared(path, method, server.client.post(where, content=b"{}", headers={"content-type": "text/plain"}))
                body = {"content": b"\xff{", "headers": {"content-type": "application/json"}}
                declared(path, method, server.client.post(where, **body))
            other = "get" if method == "post" else "post"
            refused = server.client.request(other, where)
            assert refused.status_code == 405 and refused.headers["allow"].split(", ")[0] == method.upper()
            check(document, {"$ref": "#/components/schemas/ErrorReply"}, refused.json())
    server.engine.fail = 1
    declared(CHAT, "post", server.chat())


def test_events_are_the_chunks_that_the_document_names(
    scripted: Callable[[str], Any], document: dict[str, Any]
) -> None:
    server = scripted(CALL)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for path, name, body in (
        (CHAT, "ChatChunk", {"messages": USER, "tools": TOOLS, "logprobs": True, "top_logprobs": 1, "n": 2}),
        (TEXT, "CompletionReply", {"prompt": "x", "echo": True, "logprobs": 1}),
    ):
        assert "text/event-stream" in document["paths"][path]["post"]["responses"]["200"]["content"]
        text = server.client.post(path, json={"model": "tiny", **body, **options}).text
        events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]
        assert len(events) > 5
        for event in events:
            check(document, {"$ref": f"#/components/schemas/{name}"}, event)


def test_bodies_are_closed_and_fully_named(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for path, item in document["paths"].items():
        if "post" not in item:
            continue
        reference = item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert schemas[reference.rsplit("/", 1)[1]]["additionalProperties"] is False, path
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    named = schemas["NamedSchema"]["properties"]
    assert "schema" in named and "schema_" not in named
