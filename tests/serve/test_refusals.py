"""Wrong requests: the right 4xx, a sentence, and nothing left in the engine."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]
GOOD = {"model": "tiny", "messages": USER}

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
JSON = {"type": "json_object"}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}

# (fields that replace those of a good request, the param that the error names)
WRONG = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"model": 3}, "model"),
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id"),
    ({"messages": [*USER, {"role": "tool", "content": "x", "tool_call_id": "a"}]}, "messages.1.tool_call_id"),
    ({"messages": [*USER, {"role": "assistant"}, *USER]}, "messages.1.content"),
    ({"messages": [*USER, {"role": "assistant", "tool_calls": [CALL]}, *USER]}, "messages"),
    ({"messages": [*USER, {"role": "assistant", "content": "x", "prefix": True}, *USER]}, "messages"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, None),
    ({"messages": [{"role": "user", "content": "x", "spell": 1}]}, "messages.0.spell"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
    ({"messages": [*USER, {"role": "system", "content": "late"}, *USER]}, "messages"),
    ({"messages": USER * 1025}, "messages"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": "1"}, "n"),
    ({"seed": 1 << 70}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stop": [1]}, None),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
    ({"thinking": "on"}, "thinking"),
    ({"thinking": {"type": "maybe"}}, "thinking.type"),
    ({"reasoning_effort": "colossal"}, "reasoning_effort"),
    ({"max_token": 5}, "max_token"),
    ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.type"),
    ({"thinking": {"type": "enabled", "budget_tokens": 5, "min_tokens": 6}}, "thinking.min_tokens"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "function", "function": {"name": "has spaces"}}]}, "tools.0.function.name"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": SCHEMA | {"strict": True}}, "response_format.strict"),
    ({"response_format": JSON, "guided_regex": "a"}, "guided_regex"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"type": "colour"}}, "guided_json"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"05": 1}}, "logit_bias.05"),
    ({"logit_bias": {"320": 1}}, "logit_bias"),
    ({"stop_token_ids": [320]}, "stop_token_ids"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"),
    ({"presence_penalty": -3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
]


def complaint(reply: Any, status: int) -> dict[str, Any]:
    """The error object of a reply, checked for its form."""
    assert reply.status_code == status, reply.text
    assert reply.headers["x-request-id"].startswith("req_")
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].strip() and len(error["message"]) < 2000
    return error


def test_each_wrong_field_is_named(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    for fields, param in WRONG:
        body = {name: value for name, value in {**GOOD, **fields}.items() if value is not None}
        error = complaint(server.client.post(CHAT, json=body), 400)
        assert error["type"] == "invalid_request_error"
        if param is not None:
            assert error["param"] == param, (fields, error)
            assert param.split(".")[-1] in error["message"] or "has no" in error["message"], (fields, error)
    assert server.engine.asked == []


def test_neutral_values_are_accepted(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    neutral = {
        "tools": [], "tool_choice": "none", "logprobs": False, "frequency_penalty": 0, "presence_penalty": 0.0,
        "response_format": {"type": "text"}, "user": "me", "logit_bias": {}, "n": 1, "stop": None, "seed": None,
        "stream": False, "metadata": {"a": "b"}, "store": False,
    }  # fmt: skip
    assert server.chat(**neutral).status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"{not json", "application/json", 400, "invalid_json"),
        (b"", "application/json", 400, "invalid_json"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}', "application/json", 400, None),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400, None),
        (json.dumps(GOOD | {"temperature": float("nan")}).encode(), "application/json", 400, None),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "application/json", 400, "invalid_json"),
        (b"null", "application/json", 400, None),
        (b"[]", "application/json", 400, None),
        (json.dumps(GOOD).encode(), "text/plain", 415, "unsupported_media_type"),
        (json.dumps(GOOD).encode(), "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (json.dumps(GOOD | {"user": "x" * 2_000_000}).encode(), "application/json", 413, "request_too_large"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_request(
    serve_script: Callable[..., Any], body: bytes, kind: str, status: int, code: str | None
) -> None:
    server = serve_script()
    error = complaint(server.client.post(CHAT, content=body, headers={"content-type": kind}), status)
    assert code is None or error["code"] == code
    assert server.engine.asked == []


def test_a_body_without_a_length_is_cut_off(serve_script: Callable[..., Any]) -> None:
    server = serve_script(body_bytes=2048)
    pieces = (b" " * 1024 for _ in range(8))
    complaint(server.client.post(CHAT, content=pieces, headers={"content-type": "application/json"}), 413)


def test_a_body_that_never_comes_is_given_up(serve_script: Callable[..., Any]) -> None:
    server = serve_script(body_seconds=0.2)
    host, port = server.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as slow:
        head = (
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        slow.sendall(head.encode() + b"{")
        assert b" 408 " in slow.recv(4096)


def test_paths_and_methods(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    complaint(server.client.get("/v1/nothing"), 404)
    complaint(server.client.get(CHAT), 405)
    complaint(server.client.post("/v1/models"), 405)
    complaint(server.client.post(f"{CHAT}/", json=GOOD), 404)
    assert complaint(server.client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    assert complaint(server.client.post(CHAT, json={**GOOD, "model": "other"}), 404)["param"] == "model"


def test_prompts_that_do_not_fit(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    error = complaint(server.chat("17 " * 500), 400)
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    # Without max_tokens, an answer gets what the context leaves.
    assert server.chat("x").status_code == 200
    prompt, params, _ = server.engine.asked[0]
    assert len(prompt) + params.max_tokens == 256


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, None),
        ({"prompt": [[]]}, None),
        ({"prompt": [1, "a"]}, None),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [[1]] * 65}, "prompt"),
        ({"prompt": [10_000]}, "prompt"),
        ({"prompt": [-1]}, None),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "best_of": 3}, "best_of"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
    ],
)
def test_wrong_completions(serve_script: Callable[..., Any], fields: dict[str, Any], param: str | None) -> None:
    server = serve_script()
    body = {name: value for name, value in {"model": "tiny", **fields}.items() if value is not None}
    error = complaint(server.client.post("/v1/completions", json=body), 400)
    assert param is None or error["param"] == param
    assert server.engine.asked == []


def test_what_is_wrong_is_said_once_and_in_the_words_of_json(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    asked = {"model": "tiny", "prompt": ["a"] * 65}
    message = complaint(server.client.post("/v1/completions", json=asked), 400)["message"]
    assert message == "prompt holds 65 prompts; at most 64 are possible in one request."
    body = json.dumps({**GOOD, "temperature": True, "top_p": float("nan")}).encode()
    reply = server.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    message = complaint(reply, 400)["message"]
    assert message.startswith("temperature is true; ") and "top_p is NaN; " in message


def test_monitors_may_ask_for_the_head_alone(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/"):
        reply = server.client.head(path)
        assert (reply.status_code, reply.content) == (200, b"") and int(reply.headers["content-length"]) > 0
    assert server.client.head(CHAT).status_code == 405
    assert server.client.head("/v1/models/other").status_code == 404


def test_any_json_is_answered_with_200_or_a_4xx(serve_script: Callable[..., Any]) -> None:
    server = serve_script("ok")
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    )
    names = [
        "messages",
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "max_tokens",
        "stop",
        "thinking",
        "tools",
        "tool_choice",
        "response_format",
        "logprobs",
        "top_logprobs",
        "logit_bias",
        "structured_outputs",
        "guided_choice",
        "chat_template_kwargs",
    ]
    fields = st.dictionaries(st.sampled_from([*names, "stream_options", "user", "odd"]), values, max_size=4)

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(fields)
    def check(drawn: dict[str, Any]) -> None:
        reply = server.client.post(
            CHAT, content=json.dumps({**GOOD, **drawn}), headers={"content-type": "application/json"}
        )
        if reply.status_code != 200:
            complaint(reply, reply.status_code)
            assert 400 <= reply.status_code < 500, (drawn, reply.text)

    check()
    server.until_idle()


# Keys and hosts -------------------------------------------------------------------------------------

KEY, OTHER = "a-key-that-is-long-enough", "another-key-long-enough"


def test_without_a_key_only_the_page_and_the_probes_are_open(serve_script: Callable[..., Any]) -> None:
    server = serve_script(keys=[KEY, OTHER])
    for path in ("/", "/ready", "/health"):
        assert server.client.get(path).status_code == 200
    for path in ("/v1/models", "/openapi.json", "/nothing", "/v1/models/tiny", "/health/"):
        assert complaint(server.client.get(path), 401)["code"] == "invalid_api_key"
    for wrong in (KEY, f"Basic {KEY}", f"Bearer {KEY}x", "Bearer", "Bearer \xe9"):
        reply = server.client.get("/v1/models", headers={"authorization": wrong.encode("latin-1")})
        complaint(reply, 401)
    for key in (KEY, OTHER):
        server.client.headers["authorization"] = f"Bearer {key}"
        assert server.chat().status_code == 200
    first, second = (salt for _, _, salt in server.engine.asked[-2:])
    assert first and second and first != second and KEY not in first


def test_other_hosts_are_refused_on_loopback(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", ""):
        assert complaint(server.client.get("/v1/models", headers={"host": host}), 403)["code"] == "host_not_allowed"
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000"):
        assert server.client.get("/v1/models", headers={"host": host}).status_code == 200


def test_the_openapi_document_describes_the_bodies(serve_script: Callable[..., Any]) -> None:
    document = serve_script().client.get("/openapi.json").json()
    reference = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = document["components"]["schemas"][reference.rsplit("/", 1)[1]]
    assert {"messages", "thinking", "temperature"} <= set(schema["properties"])
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"]
