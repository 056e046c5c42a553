"""A conversation in, an answer out: prompt, generation, and the reply whole or in chunks."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response

from deepwright_core.chat import opens_thinking
from deepwright_core.tokenizer import Tokenizer

from .answer import Answer, Delta
from .calls import calling
from .generation import Generation, Update, finish
from .prompt import chat_prompt
from .protocol import AnswerMessage, ChatChoice, ChatChunk, ChatReply, ChatRequest
from .protocol.tools import FunctionCall, ToolCall
from .roster import Served
from .sampling import answer_length, sampling_params
from .scores import chat_logprobs, prompt_logprobs
from .service import Service
from .streaming import EventStream, Frame
from .structured import form_of
from .thinking import thinking_control


async def answer_chat(service: Service, served: Served, http: Request, request: ChatRequest) -> Response:
    """POST /v1/chat/completions."""
    service.require_room_at_all(served, request.choices)
    tokenizer = served.tokenizer
    prompt = await asyncio.to_thread(
        chat_prompt, tokenizer, request.messages,
        tools=request.tools or (), thinking=request.thinking_mode, continues=request.continues,
    )  # fmt: skip
    length = answer_length(served, service.limits, prompt, request.length, "messages")
    opened = opens_thinking(tokenizer, prompt)
    way = calling(request, tokenizer, form_of(request))
    params = sampling_params(
        request,
        served,
        length,
        stop_ids=way.stop_ids,
        bans=way.bans,
        scores=request.scores,
        prompt_scores=request.prompt_logprobs,
        thinking=thinking_control(request, tokenizer, opened=opened, max_tokens=length, formed=way.form is not None),
        grammar=None if way.form is None else await service.compiler.compile(tokenizer, way.form),
    )
    answers = [Answer(tokenizer, stops=request.stops, thinking=opened, calls=way.possible) for _ in params]
    generation = Generation(served, [prompt] * len(params), params, answers, http.state.record, service.prices)
    head: dict[str, Any] = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
        # Which version answers: a client that sees another one knows why a seed gives other tokens.
        "system_fingerprint": served.version or None,
    }
    if request.stream:
        return EventStream(generation, _chunks(generation, head, request, tokenizer), service.limits)
    reasons = await finish(http, generation, service.limits)
    choices = [
        ChatChoice(
            index=index,
            message=_message(answer),
            finish_reason=reasons[index],
            logprobs=chat_logprobs(tokenizer, answer.scores) if request.logprobs else None,
        )
        for index, answer in enumerate(answers)
    ]
    of_prompt = generation.prompt_scores.get(0)
    reply = ChatReply(
        **head,
        choices=choices,
        usage=generation.usage(),
        prompt_logprobs=None if of_prompt is None else prompt_logprobs(tokenizer, of_prompt),
    )
    return Response(reply.model_dump_json(), media_type="application/json")


def _message(answer: Answer) -> AnswerMessage:
    calls = [
        ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments)) for call in answer.calls
    ]
    return AnswerMessage(
        content=answer.content or (None if calls else ""),
        reasoning_content=answer.reasoning or None,
        reasoning=answer.reasoning or None,
        tool_calls=calls or None,
    )


# Chunks ---------------------------------------------------------------------------------------------


async def _chunks(
    generation: Generation, head: dict[str, Any], request: ChatRequest, tokenizer: Tokenizer
) -> AsyncIterator[bytes]:
    """The events of a streamed chat completion, as JSON; empty when nothing came for a while."""
    # Plain dicts in the form of `ChatChunk`: building models for every token would cost more than decoding it.
    begin = ChatChunk(**head, choices=[]).model_dump(mode="json", exclude={"choices", "usage"})
    frame = Frame(begin, request.usage_in_stream, generation.usage)
    opening = {"role": "assistant", "content": ""}
    yield frame.chunk([_choice(Update(n, Delta()), opening) for n in range(len(generation.answers))])
    async for updates in generation.updates(beat=EventStream.BEAT):
        choices = []
        for update in updates:
            logprobs = None
            if request.logprobs and update.delta.scores:
                logprobs = chat_logprobs(tokenizer, update.delta.scores).model_dump(mode="json")
            if (added := _added(update.delta)) or logprobs or update.finish_reason:
                choices.append(_choice(update, added, logprobs))
        if choices or not updates:
            yield frame.chunk(choices) if choices else b""
    for chunk in frame.last():
        yield chunk


def _choice(update: Update, added: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": update.index, "delta": added, "finish_reason": update.finish_reason, "logprobs": logprobs}


def _added(delta: Delta) -> dict[str, Any]:
    """A delta in the form of `AnswerDelta`."""
    added: dict[str, Any] = {}
    if delta.reasoning:
        added |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    if delta.content:
        added["content"] = delta.content
    if delta.calls:
        added["tool_calls"] = [
            {"index": piece.index, "function": {"arguments": piece.arguments}}
            if piece.name is None
            else {
                "index": piece.index, "id": piece.id, "type": "function",
                "function": {"name": piece.name, "arguments": piece.arguments},
            }
            for piece in delta.calls
        ]  # fmt: skip
    return added
