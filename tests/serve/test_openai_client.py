"""The official client, unchanged: every kind of call that it has for what this server does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from enum import Enum
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.protocol import Prices

USER: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]


def client(server: Any, **options: Any) -> openai.OpenAI:
    options = {"api_key": "none", "max_retries": 0, "timeout": 20} | options
    return openai.OpenAI(base_url=f"{server.address}/v1", **options)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Step(BaseModel):
    explanation: str
    colour: Colour


class Answer(BaseModel):
    steps: list[Step]
    result: int


GOOD = '{"steps": [{"explanation": "Käse", "colour": "red"}], "result": 42}'


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # the client's own, of what it sends back
def test_parse_gives_the_callers_own_model(scripted: Callable[[str], Any]) -> None:
    server = scripted(f"<think>hm</think>{GOOD}")
    api = client(server).chat.completions
    message = api.parse(model="tiny", messages=USER, response_format=Answer).choices[0].message
    assert message.parsed == Answer(steps=[Step(explanation="Käse", colour=Colour.RED)], result=42)
    assert server.engine.asked[0][1].grammar.kind == "json_schema"
    # The parsed message goes back as it is.
    server = scripted("Good.")
    assert api.create(model="tiny", messages=[*USER, message, *USER]).choices[0].message.content == "Good."
    server = scripted('{"steps": [], "re')
    with pytest.raises(openai.LengthFinishReasonError):
        api.parse(model="tiny", messages=USER, response_format=Answer, max_tokens=5)


def test_the_stream_helper_follows_an_answer(scripted: Callable[[str], Any]) -> None:
    server = scripted(GOOD)
    api = client(server).chat.completions
    with api.stream(
        model="tiny", messages=USER, response_format=Answer, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done", "logprobs.content.delta", "logprobs.content.done"} <= kinds
    assert final.choices[0].message.parsed.result == 42 and final.usage.completion_tokens > 5


def test_everything_that_can_be_asked_at_once(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    server = scripted("42")
    client(server).chat.completions.create(
        model="tiny", messages=USER, n=2, seed=5, temperature=0.5, top_p=0.9, max_completion_tokens=20, stop=["x"],
        presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={"5": -100, "6": 3}, logprobs=True, top_logprobs=2,
        user="me", metadata={"a": "b"}, store=False, service_tier="auto", reasoning_effort="low", modalities=["text"],
        prompt_cache_key="k", safety_identifier="s", parallel_tool_calls=True, response_format={"type": "text"},
        extra_body={
            "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 1, "ignore_eos": True,
            "stop_token_ids": [7], "chat_template_kwargs": {"thinking": True}, "prompt_logprobs": 1,
        },
    )  # fmt: skip
    params = server.engine.asked[0][1]
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.2)
    assert params.logit_bias == ((5, -100.0), (6, 3.0)) and params.stop_ids == (tokenizer.user_id, 7)
    assert (params.min_tokens, params.ignore_eos, params.scores, params.prompt_scores) == (1, True, 2, 1)
    assert (params.top_k, params.min_p, params.max_tokens) == (40, 0.1, 20)
    # A low effort: a fifth of the answer's length may be thinking, which the prompt has opened.
    assert (params.thinking.budget, params.thinking.opened) == (4, True)


@pytest.mark.parametrize(
    ("fields", "budget", "least", "opened"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 7}}, 7, 0, True),
        ({"thinking": {"type": "auto", "budget_tokens": 0}}, 0, 0, False),
        ({"thinking": {"type": "enabled", "min_tokens": 3}}, None, 3, True),
        ({"reasoning_effort": "high", "max_tokens": 50}, 40, 0, True),
        ({"reasoning_effort": "xhigh", "thinking": {"type": "auto"}, "max_tokens": 100}, 95, 0, False),
        ({"guided_choice": ["yes", "no"]}, None, 0, False),
        ({"guided_choice": ["yes", "no"], "thinking": {"type": "enabled"}}, None, 0, True),
    ],
)
def test_thinking_is_bounded(
    scripted: Callable[[str], Any], tokenizer: Tokenizer, fields: dict[str, Any], budget: Any, least: int, opened: bool
) -> None:
    server = scripted("hm</think>42")
    assert server.chat(**fields).status_code == 200
    control = server.engine.asked[0][1].thinking
    assert (control.budget, control.least, control.opened) == (budget, least, opened)
    assert control.end_id == tokenizer.think_end_id and bool(control.continuation) == bool(least)
    assert control.start_id == (None if opened else tokenizer.think_start_id)


def test_no_thinking_needs_no_control(scripted: Callable[[str], Any]) -> None:
    server = scripted("42")
    for fields in ({}, {"thinking": {"type": "enabled"}}, {"reasoning_effort": "none", "guided_choice": ["42"]}):
        assert server.chat(**fields).status_code == 200
    assert [params.thinking for _, params, _ in server.engine.asked] == [None] * 3


def test_the_asynchronous_client(scripted: Callable[[str], Any]) -> None:
    server = scripted("The answer is 42.")

    async def talk() -> tuple[Any, str, list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as api:
            several = await asyncio.gather(
                *(api.chat.completions.create(model="tiny", messages=USER) for _ in range(5))
            )
            stream = await api.chat.completions.create(model="tiny", messages=USER, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])
            return several, text, [model.id async for model in api.models.list()]

    several, text, models = asyncio.run(talk())
    assert {reply.choices[0].message.content for reply in several} == {text} == {"The answer is 42."}
    assert models == ["tiny"]


def test_raw_and_streaming_responses(scripted: Callable[[str], Any]) -> None:
    server = scripted("42")
    api = client(server).chat.completions
    raw = api.with_raw_response.create(model="tiny", messages=USER, extra_headers={"x-request-id": "mine-1.a_b"})
    assert raw.status_code == 200 and raw.headers["x-request-id"] == raw.request_id == "mine-1.a_b"
    assert raw.parse().choices[0].message.content == "42"
    with api.with_streaming_response.create(model="tiny", messages=USER, stream=True) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and reply.headers["content-type"].startswith("text/event-stream")
    for asked in ("no spaces", "x" * 129, "ä"):
        headers = {b"x-request-id": asked.encode()}
        assert server.client.get("/version", headers=headers).headers["x-request-id"].startswith("req_")


def test_usage_in_every_chunk(scripted: Callable[[str], Any]) -> None:
    server = scripted("one two three")
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(client(server).chat.completions.create(
        model="tiny", messages=USER, stream=True, extra_body={"stream_options": options}
    ))  # fmt: skip
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == counts[-2] > 2
    text = server.client.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": "x", "stream": True, "stream_options": options},
    ).text
    events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line.startswith("data: {")]
    assert all(event["usage"]["prompt_tokens"] == 2 for event in events)


def test_failures_are_the_clients_own_exceptions(scripted: Callable[[str], Any]) -> None:
    server = scripted("42")
    create = client(server).chat.completions.create
    with pytest.raises(openai.BadRequestError) as wrong:
        create(model="tiny", messages=USER, extra_body={"max_token": 5})
    assert wrong.value.param == "max_token" and "Did you mean max_tokens" in wrong.value.message
    assert wrong.value.type == "invalid_request_error" and wrong.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-9'"):
        create(model="gpt-9", messages=USER)
    with pytest.raises(openai.NotFoundError, match="no embeddings here"):
        client(server).embeddings.create(model="tiny", input="x")
    with pytest.raises(openai.NotFoundError, match="/v1/chat/completions does the same"):
        client(server).responses.create(model="tiny", input="x")
    with pytest.raises(openai.BadRequestError, match=r"min_tokens is 9; expected at most max_tokens, which is 5\."):
        create(model="tiny", messages=USER, max_tokens=5, extra_body={"min_tokens": 9})
    server.engine.fail = 1
    with pytest.raises(openai.InternalServerError, match="on fire"):
        create(model="tiny", messages=USER)
    server.engine.fail = 1
    with pytest.raises(openai.APIError, match="on fire"):
        list(create(model="tiny", messages=USER, stream=True))


def test_a_client_that_stops_waiting_frees_the_engine(scripted: Callable[[str], Any]) -> None:
    server = scripted("on and on " * 40)
    server.engine.gate.clear()  # neither can be over before its client is gone
    with pytest.raises(openai.APITimeoutError):
        client(server, timeout=0.5).chat.completions.create(model="tiny", messages=USER)
    server.until_idle()
    stream = client(server).chat.completions.create(model="tiny", messages=USER, stream=True)
    next(iter(stream))
    stream.close()
    server.until_idle()
    server.engine.gate.set()
    # Those that the engine had begun with; one that still waited for its turn was taken out of the queue.
    assert not server.engine.running
    assert sorted(server.engine.cancelled) == list(range(len(server.engine.asked)))


def test_prices_are_told_where_they_are_set(scripted: Callable[[str], Any]) -> None:
    server = scripted("42")
    assert "cost" not in server.chat().json()["usage"]
    server.service.prices = Prices(input=2.0, cached=0.5, output=10.0)
    try:
        usage = server.chat().json()["usage"]
        missed, cached, written = usage["prompt_cache_miss_tokens"], 1, usage["completion_tokens"]
        assert usage["cost"] == {
            "input": pytest.approx(missed * 2e-6),
            "cached": pytest.approx(cached * 0.5e-6),
            "output": pytest.approx(written * 1e-5),
            "total": pytest.approx(missed * 2e-6 + cached * 0.5e-6 + written * 1e-5),
        }
    finally:
        server.service.prices = None


@pytest.mark.parametrize(
    ("message", "fields", "ends"),
    [
        ({"content": "The answer"}, {"prefix": True}, "<｜Assistant｜>The answer"),
        ({"content": "The answer"}, {}, "<｜Assistant｜>The answer"),
        ({"content": " 4", "reasoning_content": "17"}, {"prefix": True}, "<｜Assistant｜><think>17</think> 4"),
        ({"content": "", "reasoning": "17 + 25"}, {"prefix": True}, "<｜Assistant｜><think>17 + 25"),
        ({"content": "4"}, {"prefix": True, "thinking": "disabled"}, "<｜Assistant｜><think></think>4"),
    ],
)
def test_an_answer_that_has_begun_is_gone_on_with(
    scripted: Callable[[str], Any], tokenizer: Tokenizer, message: dict[str, Any], fields: dict[str, Any], ends: str
) -> None:
    server = scripted(" is 42.")
    more: dict[str, Any] = {} if "prefix" in fields else {"continue_final_message": True}
    if "thinking" in fields:
        more["thinking"] = {"type": fields["thinking"]}
    last = {"role": "assistant", **message} | ({"prefix": True} if "prefix" in fields else {})
    reply = server.client.post("/v1/chat/completions", json={"model": "tiny", "messages": [*USER, last], **more})
    assert reply.status_code == 200, reply.text
    assert tokenizer.decode(server.engine.asked[0][0], skip_special=False).endswith(ends)
    answer = reply.json()["choices"][0]["message"]
    assert (answer["reasoning"] if ends.endswith("25") else answer["content"]) == " is 42."


def test_a_begun_answer_that_cannot_have_thought(scripted: Callable[[str], Any]) -> None:
    server = scripted("42")
    for message, kind in (({"content": "4"}, "enabled"), ({"content": "4", "reasoning": "17"}, "disabled")):
        last = {"role": "assistant", "prefix": True, **message}
        body = {"model": "tiny", "messages": [*USER, last], "thinking": {"type": kind}}
        reply = server.client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "thinking"


def test_tokens_can_be_counted_before(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    server = scripted("42")

    def post(path: str, **body: Any) -> httpx.Response:
        return server.client.post(path, json=body)

    reply = post("/tokenize", model="tiny", prompt="Zoë 🙂", return_token_strs=True).json()
    assert reply["tokens"] == [tokenizer.bos_id, *tokenizer.encode("Zoë 🙂")]
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 512)
    assert reply["token_strs"][0] == "<｜begin▁of▁sentence｜>"
    assert post("/tokenize", prompt="a", add_special_tokens=False).json()["tokens"] == tokenizer.encode("a")
    server.chat("hello", chat_template_kwargs={"enable_thinking": False})
    messages = [{"role": "user", "content": "hello"}]
    counted = post("/tokenize", messages=messages, chat_template_kwargs={"enable_thinking": False}).json()
    assert counted["tokens"] == server.engine.asked[0][0] and counted["token_strs"] is None
    text = post("/detokenize", tokens=counted["tokens"]).json()["prompt"]
    assert text == "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜><think></think>"
    assert post("/detokenize", tokens=[]).json() == {"prompt": ""}
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": messages}, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
    ):
        refused = post(path, **body)
        assert refused.status_code in (400, 404) and refused.json()["error"]["param"] == param
    assert server.client.get("/version").json()["version"]
    card = server.client.get("/v1/models/tiny").json()
    assert (card["root"], card["parent"], card["max_model_len"]) == ("tiny", None, 512)
