"""A text continued: prompts as text or ids in, their continuations out, whole or in chunks."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import Request, Response

from deepwright_core.tokenizer import Tokenizer

from .answer import Continuation
from .generation import Generation, finish
from .protocol import CompletionReply, CompletionRequest, TextChoice
from .refusal import Refusal
from .roster import Served
from .service import Service
from .streaming import EventStream


async def complete_text(service: Service, served: Served, http: Request, request: CompletionRequest) -> Response:
    """POST /v1/completions."""
    service.require_room_at_all(served, request.choices * len(request.prompts))
    encoded = await asyncio.to_thread(_encode, served.tokenizer, request.prompts)
    prompts, params = [], []
    for prompt in encoded:
        of_prompt = service.params(served, request, prompt, request.max_tokens)
        params += of_prompt
        prompts += [prompt] * len(of_prompt)
    answers = [Continuation(served.tokenizer, stops=request.stops) for _ in params]
    generation = Generation(served, prompts, params, answers, http.state.record)
    head: dict[str, Any] = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
    }
    if request.stream:
        return EventStream(generation, _text_chunks(generation, head, request.wants_usage), service.limits)
    reasons = await finish(http, generation, service.limits)
    choices = [
        TextChoice(index=index, text=answer.content, finish_reason=reasons[index])
        for index, answer in enumerate(answers)
    ]
    return Response(
        CompletionReply(**head, choices=choices, usage=generation.usage()).model_dump_json(),
        media_type="application/json",
    )


def _encode(tokenizer: Tokenizer, prompts: Iterable[str | list[int]]) -> list[list[int]]:
    """Ids of each prompt. Text begins a document, as in training; ids are taken as they are."""
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded.append([*tokenizer.begin_ids, *tokenizer.encode(prompt)])
            continue
        highest = max(prompt)
        if highest >= tokenizer.vocab_size:
            raise Refusal(
                400, f"prompt holds token {highest}; ids go up to {tokenizer.vocab_size - 1}.",
                param="prompt", code="invalid_value",
            )  # fmt: skip
        encoded.append(prompt)
    return encoded


async def _text_chunks(generation: Generation, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    async for updates in generation.updates(beat=EventStream.BEAT):
        choices = [
            TextChoice(index=update.index, text=update.delta.content, finish_reason=update.finish_reason)
            for update in updates
            if update.delta or update.finish_reason
        ]
        if choices or not updates:
            chunk = CompletionReply(**head, choices=choices)
            yield chunk.model_dump_json(exclude=None if usage else {"usage"}) if choices else ""
    if usage:
        yield CompletionReply(**head, choices=[], usage=generation.usage()).model_dump_json()
