"""Calls of tools with the official client: whole and streamed, demanded and free, and their outputs coming back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from deepwright_core.chat import Reply, parse_reply
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.answer import Answer
from deepwright_serve.calls import arguments_schema
from deepwright_serve.protocol.tools import Tool

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def call(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


ONE = BEGIN + call("add", '{"a": 17, "b": 25}') + END
TWO = "<think>both</think>Let me see. 你" + BEGIN + call("add", '{"a": 1}') + call("say", '{"text": "Zoë 🙂"}') + END


class Add(BaseModel):
    """Adds."""

    a: int
    b: int


TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": Add.model_json_schema()}},
    {"type": "function", "function": {"name": "say"}},
]
USER: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]


def ask(server: Any, messages: list[Any] = USER, tools: Any = TOOLS, **fields: Any) -> Any:
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=20)
    return client.chat.completions.create(model="tiny", messages=messages, tools=tools, **fields)


def test_calls_come_apart_from_text_and_thinking(scripted: Callable[[str], Any]) -> None:
    choice = ask(scripted(TWO)).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert (choice.message.content, choice.message.reasoning_content) == ("Let me see. 你", "both")
    calls = choice.message.tool_calls
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("function", "add", {"a": 1}),
        ("function", "say", {"text": "Zoë 🙂"}),
    ]
    assert len({c.id for c in calls}) == 2 and all(c.id.startswith("call_") for c in calls)
    assert ask(scripted(ONE)).choices[0].message.content is None


def test_streamed_pieces_make_up_the_same_calls(scripted: Callable[[str], Any]) -> None:
    server = scripted(TWO)
    calls: dict[int, dict[str, str]] = {}
    content, pieces, reasons = "", 0, []
    for chunk in ask(server, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
            for piece in choice.delta.tool_calls or []:
                pieces += 1
                if piece.index not in calls:
                    assert piece.id and piece.type == "function" and piece.function.name
                    calls[piece.index] = {"name": piece.function.name, "arguments": ""}
                else:
                    assert piece.id is None and piece.function.name is None
                calls[piece.index]["arguments"] += piece.function.arguments
    assert content == "Let me see. 你" and reasons == ["tool_calls"] and pieces > 4
    assert calls == {
        0: {"name": "add", "arguments": '{"a": 1}'},
        1: {"name": "say", "arguments": '{"text": "Zoë 🙂"}'},
    }


def test_the_clients_own_helpers_for_streams_and_models(scripted: Callable[[str], Any]) -> None:
    server = scripted(ONE)
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=20)
    tool = openai.pydantic_function_tool(Add, name="add")
    parsed = client.chat.completions.parse(model="tiny", messages=USER, tools=[tool])
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == Add(a=17, b=25)
    # A strict function is kept to by a grammar even where the model may choose.
    assert server.engine.asked[-1][1].grammar.kind == "lark"
    assert "strict" not in server.served.tokenizer.decode(server.engine.asked[-1][0])
    with client.chat.completions.stream(model="tiny", messages=USER, tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert final.choices[0].message.tool_calls[0].function.name == "add"


def test_outputs_come_back_in_the_order_of_their_calls(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    message = ask(scripted(TWO)).choices[0].message
    server = scripted("42")
    outputs: list[Any] = [
        {"role": "tool", "tool_call_id": c.id, "content": f"output of {c.function.name}"} for c in message.tool_calls
    ]
    # The client's own message object goes back as it came.
    reply = ask(server, messages=[*USER, message, *reversed(outputs)])
    assert reply.choices[0].message.content == "42" and reply.choices[0].finish_reason == "stop"
    expected = tokenizer.chat(
        [
            *USER,
            {
                "role": "assistant",
                "content": "Let me see. 你",
                "tool_calls": [{"function": c.function.model_dump()} for c in message.tool_calls],
            },
            *outputs,
        ],
        tools=TOOLS,
    )
    assert server.engine.asked[0][0] == expected


@pytest.mark.parametrize(
    ("fields", "mark", "grammar"),
    [
        ({}, "tool_calls_end", None),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, "tool_call_end", None),
        ({"tool_choice": "required"}, "tool_calls_end", "lark"),
        ({"tool_choice": {"type": "function", "function": {"name": "say"}}}, "tool_call_end", "lark"),
        ({"response_format": {"type": "json_object"}}, "tool_calls_end", "lark"),
    ],
)
def test_what_the_engine_is_told(
    scripted: Callable[[str], Any], tokenizer: Tokenizer, fields: dict[str, Any], mark: str, grammar: str | None
) -> None:
    server = scripted(ONE)
    ask(server, **fields)
    params = server.engine.asked[0][1]
    assert params.stop_ids == (tokenizer.user_id, tokenizer.marks[mark])
    assert (params.grammar and params.grammar.kind) == grammar


def test_none_forbids_the_mark_and_keeps_the_prompt(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    server = scripted("42")
    for choice in ("auto", "none"):
        assert ask(server, tool_choice=choice).choices[0].message.tool_calls is None
    (free, _, _), (prompt, params, _) = server.engine.asked
    assert prompt == free and params.logit_bias == ((tokenizer.marks["tool_calls_begin"], -100.0),)


def test_without_tools_nothing_is_a_call(scripted: Callable[[str], Any]) -> None:
    message = ask(scripted(ONE), tools=openai.omit).choices[0].message
    assert message.tool_calls is None and message.content == 'add{"a": 17, "b": 25}'


def test_a_call_cut_off_by_length_is_told_as_such(scripted: Callable[[str], Any]) -> None:
    choice = ask(scripted(ONE), max_tokens=9).choices[0]
    assert choice.finish_reason == "length" and choice.message.tool_calls[0].function.name == "add"


def test_a_tokenizer_without_marks_refuses_tools(scripted: Callable[[str], Any], tokenizer: Tokenizer) -> None:
    server = scripted("42")
    whole = server.served.tokenizer
    document = json.loads(tokenizer.source)
    document["added_tokens"] = [t for t in document["added_tokens"] if "tool" not in t["content"]]
    document["model"]["vocab"] = {t: i for t, i in document["model"]["vocab"].items() if "▁call" not in t}
    server.served.tokenizer = Tokenizer(json.dumps(document))
    try:
        with pytest.raises(openai.BadRequestError, match="tokenizer has no <｜tool▁calls▁begin｜>"):
            ask(server)
    finally:
        server.served.tokenizer = whole


@pytest.mark.parametrize(
    "text",
    [
        ONE,
        TWO,
        "no calls at all",
        "<think>no</think>" + ONE,
        BEGIN + call("a", "{}") + call("b", "not json") + END,
        BEGIN + call("a", '{"x": "' + "你" * 5 + '"}') + END,
    ],
)
def test_the_reader_agrees_with_the_chat_forms_own(tokenizer: Tokenizer, text: str) -> None:
    ids = [*tokenizer.encode(text, allow_special=True), tokenizer.eos_id]
    answer = Answer(tokenizer, calls=True)
    pieces = [piece for token in ids for piece in answer.push(token).calls] + list(answer.finish().calls)
    whole: Reply = parse_reply(tokenizer, ids)
    assert [(c.name, c.arguments) for c in answer.calls] == [(c.name, c.arguments) for c in whole.tool_calls]
    for index, made in enumerate(answer.calls):
        assert "".join(p.arguments for p in pieces if p.index == index) == made.arguments
    assert answer.content == whole.answer


@pytest.mark.parametrize(
    "text",
    [
        BEGIN + END,
        BEGIN + "words" + call("a", "{}") + "more" + END,
        BEGIN + "<｜tool▁call▁begin｜>a<｜tool▁call▁end｜>" + call("b", "{}"),
        BEGIN + "<｜tool▁call▁begin｜><｜tool▁sep｜>{}<｜tool▁call▁end｜>",
        BEGIN + "<｜tool▁sep｜>{}" + END + call("late", "{}"),
        BEGIN + "<｜tool▁call▁begin｜>a<｜tool▁sep｜>{<｜tool▁sep｜>}",
    ],
)
def test_marks_in_disorder_break_nothing(tokenizer: Tokenizer, text: str) -> None:
    answer = Answer(tokenizer, calls=True)
    for token in tokenizer.encode(text, allow_special=True):
        answer.push(token)
    answer.finish()
    assert all(made.name in ("a", "b", "late") for made in answer.calls) and answer.content == ""


def test_the_arguments_of_a_function_are_an_object() -> None:
    def schema(**function: Any) -> dict[str, Any]:
        return arguments_schema(Tool(type="function", function={"name": "f", **function}))

    assert schema() == {"type": "object", "additionalProperties": False}
    assert schema(parameters={"properties": {"a": {}}}) == {"type": "object", "properties": {"a": {}}}
    assert schema(parameters={"type": "array"}) == {"type": "object"}
