"""A conversation in, an answer out: prompt, generation, and the reply whole or in chunks."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response

from deepwright_core.chat import opens_thinking

from .answer import Answer
from .generation import Generation, finish
from .protocol import AnswerMessage, ChatChoice, ChatChunk, ChatReply, ChatRequest
from .roster import Served
from .service import Service
from .streaming import EventStream


async def answer_chat(service: Service, served: Served, http: Request, request: ChatRequest) -> Response:
    """POST /v1/chat/completions."""
    service.require_room_at_all(served, request.choices)
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in request.messages
    ]
    tokenizer = served.tokenizer
    prompt = await asyncio.to_thread(tokenizer.chat, messages, thinking=request.thinking_mode)
    params = service.params(served, request, prompt, request.length)
    opened = opens_thinking(tokenizer, prompt)
    answers = [Answer(tokenizer, stops=request.stops, thinking=opened) for _ in params]
    generation = Generation(served, [prompt] * len(params), params, answers, http.state.record)
    head: dict[str, Any] = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
    }
    if request.stream:
        return EventStream(generation, _chat_chunks(generation, head, request.wants_usage), service.limits)
    reasons = await finish(http, generation, service.limits)
    choices = [
        ChatChoice(
            index=index,
            message=AnswerMessage(
                content=answer.content,
                reasoning_content=answer.reasoning or None,
                reasoning=answer.reasoning or None,
            ),
            finish_reason=reasons[index],
        )
        for index, answer in enumerate(answers)
    ]
    return Response(
        ChatReply(**head, choices=choices, usage=generation.usage()).model_dump_json(), media_type="application/json"
    )


async def _chat_chunks(generation: Generation, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """The events of a streamed chat completion, as JSON; an empty string when nothing came for a while."""
    # Plain dicts in the form of `ChatChunk`: building models for every token would cost more than decoding it.
    frame = {
        **ChatChunk(**head, choices=[]).model_dump(mode="json", exclude={"usage"}),
        **({"usage": None} if usage else {}),
    }

    def chunk(choices: list[dict[str, Any]]) -> str:
        return EventStream.dump({**frame, "choices": choices})

    def choice(index: int, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}

    yield chunk([choice(index, {"role": "assistant", "content": ""}) for index in range(len(generation.answers))])
    async for updates in generation.updates(beat=EventStream.BEAT):
        choices = []
        for update in updates:
            delta: dict[str, str] = {}
            if update.delta.reasoning:
                delta |= {"reasoning_content": update.delta.reasoning, "reasoning": update.delta.reasoning}
            if update.delta.content:
                delta["content"] = update.delta.content
            if delta or update.finish_reason:
                choices.append(choice(update.index, delta, update.finish_reason))
        if choices or not updates:
            yield chunk(choices) if choices else ""
    if usage:
        yield ChatChunk(**head, choices=[], usage=generation.usage()).model_dump_json()
