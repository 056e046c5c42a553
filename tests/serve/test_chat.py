"""POST /v1/chat/completions as the official client sees it: whole, streamed, several, thinking, usage, stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.protocol import ChatChunk, ChunkChoice

THOUGHT = "<think>17 + 25</think>The answer is 42."


def client(server: Any, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key=key, max_retries=0, timeout=20)


def ask(server: Any, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What is 17 + 25?"}], **fields}
    return client(server).chat.completions.create(**body)


def test_a_whole_answer(serve_script: Callable[..., Any], tokenizer: Tokenizer) -> None:
    server = serve_script(THOUGHT)
    reply = ask(server)
    message = reply.choices[0].message
    assert message.content == "The answer is 42."
    assert message.reasoning_content == message.reasoning == "17 + 25"
    assert reply.choices[0].finish_reason == "stop"
    prompt = len(server.engine.asked[0][0])
    generated = len(tokenizer.encode(THOUGHT, allow_special=True)) + 1
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (prompt, generated, prompt + generated)
    assert usage.completion_tokens_details.reasoning_tokens == len(tokenizer.encode("17 + 25")) + 2
    assert usage.prompt_tokens_details.cached_tokens == 1
    assert (usage.prompt_cache_hit_tokens, usage.prompt_cache_miss_tokens) == (1, prompt - 1)
    assert reply._request_id.startswith("req_")


def test_a_stream_says_the_same_as_the_whole(serve_script: Callable[..., Any]) -> None:
    server = serve_script(THOUGHT)
    whole = ask(server)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    for name in ("reasoning", "reasoning_content"):
        assert "".join(getattr(delta, name, "") for delta in deltas) == whole.choices[0].message.reasoning
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_without_usage_has_none(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    with server.client.stream("POST", "/v1/chat/completions", json=body(stream=True)) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "data: [DONE]" and "usage" not in "".join(lines)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}


@pytest.mark.parametrize(
    ("fields", "ends_with"),
    [
        ({}, ("assistant_id",)),
        ({"thinking": {"type": "enabled"}}, ("assistant_id", "think_start_id")),
        ({"thinking": {"type": "disabled"}}, ("assistant_id", "think_start_id", "think_end_id")),
        ({"reasoning_effort": "none"}, ("assistant_id", "think_start_id", "think_end_id")),
        ({"reasoning_effort": "high"}, ("assistant_id", "think_start_id")),
        ({"reasoning_effort": "high", "thinking": {"type": "auto"}}, ("assistant_id",)),
    ],
)
def test_thinking_is_chosen_by_the_prompt(
    serve_script: Callable[..., Any], tokenizer: Tokenizer, fields: dict[str, Any], ends_with: tuple[str, ...]
) -> None:
    server = serve_script("hm</think>42" if ends_with[-1] == "think_start_id" else "42")
    message = server.chat(**fields).json()["choices"][0]["message"]
    prompt = server.engine.asked[0][0]
    assert tuple(prompt[-len(ends_with) :]) == tuple(getattr(tokenizer, name) for name in ends_with)
    assert message["content"] == "42"
    assert message["reasoning_content"] == ("hm" if ends_with[-1] == "think_start_id" else None)


def test_several_answers_have_their_own_seeds_and_share_one_prompt(serve_script: Callable[..., Any]) -> None:
    server = serve_script(THOUGHT)
    reply = ask(server, n=3, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [params.seed for _, params, _ in server.engine.asked] == [7, 8, 9]
    assert reply.usage.prompt_tokens == len(server.engine.asked[0][0])
    chunks = ask(server, n=2, stream=True)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "The answer is 42.", 1: "The answer is 42."}


def test_sampling_reaches_the_engine(serve_script: Callable[..., Any], tokenizer: Tokenizer) -> None:
    server = serve_script()
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_completion_tokens": 7, "seed": -1}
    assert server.chat(**fields).status_code == 200
    params = server.engine.asked[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.max_tokens) == (0.5, 0.9, 40, 0.05, 7)
    assert params.seed == 2**63 - 1 and params.stop_ids == (tokenizer.user_id,)
    assert server.chat(top_k=-1).status_code == 200 and server.engine.asked[1][1].top_k == 0
    assert server.engine.asked[1][1].temperature == 1.0


def test_length_is_a_finish_reason(serve_script: Callable[..., Any]) -> None:
    reply = ask(serve_script("one two three four five six"), max_tokens=3)
    assert reply.choices[0].finish_reason == "length" and reply.usage.completion_tokens == 3


def test_a_stop_string_ends_the_answer_and_the_work(serve_script: Callable[..., Any]) -> None:
    server = serve_script("one two STOP " + "and on " * 500)
    for fields in ({"stop": "STOP"}, {"stop": ["nothing", "STOP"]}):
        reply = ask(server, max_tokens=200, **fields)
        assert reply.choices[0].message.content == "one two "
        assert reply.choices[0].finish_reason == "stop"
    server.until_idle()
    assert server.engine.cancelled == [0, 1]


def test_earlier_turns_come_back_without_their_thinking(serve_script: Callable[..., Any], tokenizer: Tokenizer) -> None:
    server = serve_script()
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "17"}, {"type": "text", "text": " + 25?"}]},
        {"role": "assistant", "content": "42", "reasoning_content": "secret", "reasoning": "secret", "refusal": None},
        {"role": "user", "content": "<｜User｜><think>"},
    ]
    assert server.client.post("/v1/chat/completions", json=body(messages=messages)).status_code == 200
    prompt = server.engine.asked[0][0]
    text = tokenizer.decode(prompt)
    assert "Be brief." in text and "17 + 25?" in text and "secret" not in text
    # What looks like special tokens in a message is text.
    assert prompt.count(tokenizer.user_id) == 2 and tokenizer.think_start_id not in prompt


def test_errors_are_the_clients_own_classes(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(server, model="gpt-9")
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as hot:
        ask(server, temperature=9)
    assert hot.value.param == "temperature"


def test_models(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    models = client(server).models
    assert [model.id for model in models.list()] == ["tiny"]
    assert models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        models.retrieve("some/other")


def test_plain_completions(serve_script: Callable[..., Any], tokenizer: Tokenizer) -> None:
    server = serve_script(" is 42.")
    api = client(server).completions
    assert api.create(model="tiny", prompt="The answer").choices[0].text == " is 42."
    assert server.engine.asked[0][0] == [tokenizer.bos_id, *tokenizer.encode("The answer")]
    several = api.create(model="tiny", prompt=[[5, 6], [7]], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [prompt for prompt, _, _ in server.engine.asked[1:]] == [[5, 6], [5, 6], [7], [7]]
    assert several.usage.prompt_tokens == 3
    chunks = list(api.create(model="tiny", prompt="x", stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == " is 42."
    assert chunks[-1].usage.completion_tokens == len(tokenizer.encode(" is 42.")) + 1


def test_every_chunk_has_the_form_that_the_protocol_declares(serve_script: Callable[..., Any]) -> None:
    server = serve_script(THOUGHT)
    for fields in ({}, {"stream_options": {"include_usage": True}}):
        events = server.chat(stream=True, n=2, **fields).text.split("\n\n")
        for event in events[:-2]:
            chunk = ChatChunk.model_validate_json(event.removeprefix("data: "))
            given = json.loads(event.removeprefix("data: "))
            assert set(given) == set(ChatChunk.model_fields) - (set() if fields else {"usage"})
            assert all(set(choice) == set(ChunkChoice.model_fields) for choice in given["choices"])
            assert chunk.object == "chat.completion.chunk" and chunk.model == "tiny"
