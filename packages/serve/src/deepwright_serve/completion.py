"""A text continued: prompts as text or ids in, their continuations out, whole or in chunks.

With `echo`, the prompt stands before each continuation, and its tokens' log-probabilities before the continuation's:
what evaluation harnesses score given texts with.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response

from deepwright_core.engine import TokenScore
from deepwright_core.tokenizer import Tokenizer

from .answer import Continuation, Delta
from .generation import Generation, finish
from .protocol import ChatFinishReason, CompletionReply, CompletionRequest, FinishReason
from .refusal import Refusal
from .roster import Served
from .sampling import answer_length, sampling_params
from .scores import echoed_logprobs, prompt_logprobs, text_logprobs
from .service import Service
from .streaming import EventStream, Frame
from .structured import form_of


class Nothing(Continuation):
    """Of a request that only looks at its prompt: the one token that the engine must draw is not shown."""

    def push(self, token_id: int, score: TokenScore | None = None) -> Delta:
        return Delta()


async def complete_text(service: Service, served: Served, http: Request, request: CompletionRequest) -> Response:
    """POST /v1/completions."""
    service.require_room_at_all(served, request.choices * len(request.prompts))
    encoded = await asyncio.to_thread(lambda: [_encode(served.tokenizer, prompt) for prompt in request.prompts])
    form = form_of(request)
    grammar = None if form is None else await service.compiler.compile(served.tokenizer, form)
    of_prompt = [request.prompt_logprobs, request.logprobs if request.echo else None]
    prompts, params = [], []
    for prompt in encoded:
        # Of a request that only looks at its prompt, the engine draws one token all the same.
        wanted = request.max_tokens if request.max_tokens != 0 else 1
        length = answer_length(served, service.limits, prompt, wanted, "prompt")
        of_one = sampling_params(
            request,
            served,
            length,
            scores=request.logprobs,
            prompt_scores=max((count for count in of_prompt if count is not None), default=None),
            grammar=grammar,
        )
        params += of_one
        prompts += [prompt] * len(of_one)
    kind = Nothing if request.max_tokens == 0 else Continuation
    answers = [kind(served.tokenizer, stops=request.stops) for _ in params]
    generation = Generation(served, prompts, params, answers, http.state.record, service.prices)
    head: dict[str, Any] = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": served.name,
        # Which version answers: a client that sees another one knows why a seed gives other tokens.
        "system_fingerprint": served.version or None,
    }
    writer = Writer(generation, request, served.tokenizer, prompts)
    if request.stream:
        return EventStream(generation, _chunks(writer, head), service.limits)
    reasons = await finish(http, generation, service.limits)
    choices = [
        writer.choice(index, Delta(content=answer.content, scores=tuple(answer.scores)), reasons[index])
        for index, answer in enumerate(answers)
    ]
    reply = CompletionReply(**head, choices=choices, usage=generation.usage())
    return Response(reply.model_dump_json(), media_type="application/json")


def _encode(tokenizer: Tokenizer, prompt: str | list[int]) -> list[int]:
    """Ids of a prompt. Text begins a document, as in training; ids are taken as they are."""
    if isinstance(prompt, str):
        ids = [*tokenizer.begin_ids, *tokenizer.encode(prompt)]
        if not ids:
            raise Refusal(400, "prompt holds no token; give it some text.", param="prompt", code="invalid_value")
        return ids
    highest = max(prompt)
    if highest >= tokenizer.vocab_size:
        raise Refusal(
            400, f"prompt holds token {highest}; ids go up to {tokenizer.vocab_size - 1}.",
            param="prompt", code="invalid_value",
        )  # fmt: skip
    return prompt


class Writer:
    """Writes choices: each one's first part begins with the prompt, if it is to be echoed."""

    def __init__(
        self, generation: Generation, request: CompletionRequest, tokenizer: Tokenizer, prompts: list[list[int]]
    ) -> None:
        self.generation = generation
        self.request = request
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._begun: set[int] = set()

    def choice(self, index: int, delta: Delta, reason: ChatFinishReason | None) -> dict[str, Any]:
        """What came for one continuation since its last part, in the form of `TextChoice`."""
        request = self.request
        scores = self.generation.prompt_scores.get(index)
        echoed = self._echoed(index) if request.echo else ""
        first = index not in self._begun
        self._begun.add(index)
        ended: FinishReason | None = None
        if reason is not None:
            ended = "length" if reason == "length" or request.max_tokens == 0 else "stop"
        logprobs = None
        if request.logprobs is not None:
            before = None
            if request.echo and first:
                before = echoed_logprobs(self._tokenizer, self._prompts[index], scores or ())
            logprobs = text_logprobs(self._tokenizer, delta.scores, start=len(echoed), prompt=before)
        return {
            "index": index,
            "text": (echoed if first else "") + delta.content,
            "finish_reason": ended,
            "logprobs": logprobs,
            "prompt_logprobs": prompt_logprobs(self._tokenizer, scores)
            if request.prompt_logprobs is not None and scores is not None
            else None,
        }

    def _echoed(self, index: int) -> str:
        prompt = self.request.prompts[index // self.request.choices]
        return prompt if isinstance(prompt, str) else Continuation.of(self._tokenizer, prompt).content


async def _chunks(writer: Writer, head: dict[str, Any]) -> AsyncIterator[bytes]:
    """The events of a streamed completion, as JSON; empty when nothing came for a while."""
    generation = writer.generation
    begin = CompletionReply(**head, choices=[], usage=None).model_dump(mode="json", exclude={"choices", "usage"})
    frame = Frame(begin, writer.request.usage_in_stream, generation.usage)
    async for updates in generation.updates(beat=EventStream.BEAT):
        choices = [
            writer.choice(update.index, update.delta, update.finish_reason)
            for update in updates
            if update.delta or update.finish_reason
        ]
        if choices or not updates:
            yield frame.chunk(choices) if choices else b""
    for chunk in frame.last():
        yield chunk
