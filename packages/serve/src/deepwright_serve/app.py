"""The application: routes over one engine. Everything a route does is here, top to bottom.

A chat request goes: body -> `protocol.ChatRequest` -> prompt ids (chat form) -> `Generation` -> JSON or SSE.
Left out: tools, structured output, log-probabilities, metrics for dashboards, several models at once.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from deepwright_core.chat import opens_thinking
from deepwright_core.engine import SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.tokenizer import Tokenizer

from . import page
from .answer import Answer, Continuation
from .edge import Door, Edge
from .generation import Generation, HungUp, unless_hung_up
from .keys import Keys
from .limits import Limits
from .protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    GenerationRequest,
    ModelCard,
    ModelList,
    Status,
    TextChoice,
)
from .reading import body_of
from .refusal import ErrorReply, Refusal
from .scheduling import EngineLike, EngineThread, Ticket
from .streaming import EventStream

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)
}
# A token for somebody this recently proves as much as a probe would.
FRESH_SECONDS = 1.0


@dataclass
class Service:
    """What the routes work with. `context` is the most tokens that prompt and answer may have together."""

    engine: EngineLike
    tokenizer: Tokenizer
    name: str
    context: int
    limits: Limits = field(default_factory=Limits)
    keys: Keys | None = None
    local: bool = True

    def __post_init__(self) -> None:
        self.thread = EngineThread(self.engine, self.limits.running + self.limits.waiting)
        self.door = Door(self.keys, self.local)
        self.created = int(time.time())
        self._probe: asyncio.Task[None] | None = None

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt: one must be left for the answer."""
        return min(self.limits.prompt_tokens or self.context, self.context - 1)

    def require_model(self, name: str) -> None:
        """Refuse a model that is not served."""
        if name != self.name:
            raise Refusal(
                404, f"There is no model '{name}' here; this server has '{self.name}'.",
                param="model", code="model_not_found",
            )  # fmt: skip

    def params(self, request: GenerationRequest, prompt: Sequence[int], wanted: int | None) -> list[SamplingParams]:
        """Sampling of each of a prompt's answers; refuses what does not fit."""
        if len(prompt) > self.longest_prompt:
            raise Refusal(
                400, f"The prompt has {len(prompt)} tokens; at most {self.longest_prompt} are possible. Shorten it.",
                param="messages" if hasattr(request, "messages") else "prompt", code="context_length_exceeded",
            )  # fmt: skip
        left = self.context - len(prompt)
        most = min(self.limits.output_tokens or left, left)
        if wanted is not None and wanted > most:
            raise Refusal(
                400,
                f"max_tokens is {wanted}; beside a prompt of {len(prompt)} tokens, at most {most} are possible "
                f"(context {self.context}).",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        length = min(self.limits.default_output_tokens, most) if wanted is None else wanted
        seed = secrets.randbits(62) if request.seed is None else request.seed
        one = 1.0
        return [
            SamplingParams(
                max_tokens=length,
                temperature=one if request.temperature is None else request.temperature,
                top_p=one if request.top_p is None else request.top_p,
                top_k=max(request.top_k or 0, 0),
                min_p=request.min_p or 0.0,
                seed=(seed + choice) % (1 << 63),
                # The next turn is the user's to write.
                stop_ids=() if self.tokenizer.user_id is None else (self.tokenizer.user_id,),
            )
            for choice in range(request.choices)
        ]

    def require_room_at_all(self, answers: int) -> None:
        """Refuse a request that could not even run alone."""
        if answers > self.thread.capacity:
            raise Refusal(400, f"The request asks for {answers} answers; at most {self.thread.capacity} are possible.")

    async def prove_alive(self) -> None:
        """Return once a token was generated just now, for a probe or for anybody; `Refusal` after the deadline."""
        if self.thread.broken is not None:
            raise Refusal(503, f"The engine has stopped: {self.thread.broken}.", code="engine_failed")
        if time.monotonic() - self.thread.last_token_at < FRESH_SECONDS:
            return
        # Callers at the same time share one probe.
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._generate_one())
        await asyncio.shield(self._probe)

    async def _generate_one(self) -> None:
        limit = self.limits.health_seconds
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        ticket = Ticket([*self.tokenizer.begin_ids] or [0], params, sink=lambda item: None)
        seen = asyncio.ensure_future(self.thread.wait_for_token())
        try:
            # When every place is taken, the running requests are the probe.
            if self.thread.open < self.thread.capacity:
                self.thread.submit([ticket])
            async with asyncio.timeout(limit):
                await seen
        except TimeoutError:
            raise Refusal(503, f"No token was generated within {limit:g} s.", code="engine_stuck") from None
        finally:
            seen.cancel()
            self.thread.cancel(ticket)


def create_app(service: Service) -> Edge:
    """The ASGI application of a service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.thread.start()
        yield
        await service.thread.stop()

    app = FastAPI(
        title="deepwright",
        description="OpenAI-compatible endpoints over deepwright's engine.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_error_objects(app)
    chat_page = page.load()
    chat_body = Depends(body_of(ChatRequest, service.limits))
    completion_body = Depends(body_of(CompletionRequest, service.limits))

    @app.get("/", response_class=HTMLResponse, summary="The chat page")
    async def chat_window() -> Response:
        return HTMLResponse(chat_page.html, headers={"content-security-policy": chat_page.policy})

    @app.get("/ready", response_model=Status, responses={503: {"model": ErrorReply}}, summary="May requests be sent?")
    async def ready() -> Status:
        if service.door.draining:
            raise Refusal(503, "The server is shutting down.", code="shutting_down")
        if service.thread.broken is not None:
            raise Refusal(503, f"The engine has stopped: {service.thread.broken}.", code="engine_failed")
        if service.thread.open >= service.thread.capacity:
            raise Refusal(503, "Every place is taken.", code="queue_full")
        return Status()

    @app.get("/health", response_model=Status, responses={503: {"model": ErrorReply}}, summary="Does it generate?")
    async def health() -> Status:
        await service.prove_alive()
        return Status()

    def card() -> ModelCard:
        return ModelCard(id=service.name, created=service.created, max_model_len=service.context)

    @app.get("/v1/models", response_model=ModelList, responses={401: {"model": ErrorReply}})
    async def models() -> ModelList:
        return ModelList(data=[card()])

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=_only(401, 404))
    async def model(name: str) -> ModelCard:
        service.require_model(name)
        return card()

    @app.post(
        "/v1/chat/completions",
        response_model=ChatReply,
        responses=REFUSALS,
        openapi_extra=_body_schema(ChatRequest),
        summary="Answer a conversation",
    )
    async def chat_completions(http: Request, request: ChatRequest = chat_body) -> Response:
        service.require_model(request.model)
        service.require_room_at_all(request.choices)
        messages = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text}
            for message in request.messages
        ]
        tokenizer = service.tokenizer
        prompt = await asyncio.to_thread(tokenizer.chat, messages, thinking=request.thinking_mode)
        params = service.params(request, prompt, request.length)
        opened = opens_thinking(tokenizer, prompt)
        answers = [Answer(tokenizer, stops=request.stops, thinking=opened) for _ in params]
        generation = Generation(service.thread, [prompt] * len(params), params, answers, http.state.tenant)
        head: dict[str, Any] = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }
        if request.stream:
            return EventStream(generation, _chat_chunks(generation, head, request.wants_usage), service.limits)
        reasons = await _finish(http, generation, service.limits)
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
        return _json(ChatReply(**head, choices=choices, usage=generation.usage()))

    @app.post(
        "/v1/completions",
        response_model=CompletionReply,
        responses=REFUSALS,
        openapi_extra=_body_schema(CompletionRequest),
        summary="Continue a text",
    )
    async def completions(http: Request, request: CompletionRequest = completion_body) -> Response:
        service.require_model(request.model)
        service.require_room_at_all(request.choices * len(request.prompts))
        encoded = await asyncio.to_thread(_encode, service.tokenizer, request.prompts)
        prompts, params = [], []
        for prompt in encoded:
            of_prompt = service.params(request, prompt, request.max_tokens)
            params += of_prompt
            prompts += [prompt] * len(of_prompt)
        answers = [Continuation(service.tokenizer, stops=request.stops) for _ in params]
        generation = Generation(service.thread, prompts, params, answers, http.state.tenant)
        head: dict[str, Any] = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }
        if request.stream:
            return EventStream(generation, _text_chunks(generation, head, request.wants_usage), service.limits)
        reasons = await _finish(http, generation, service.limits)
        choices = [
            TextChoice(index=index, text=answer.content, finish_reason=reasons[index])
            for index, answer in enumerate(answers)
        ]
        return _json(CompletionReply(**head, choices=choices, usage=generation.usage()))

    _describe_bodies(app, ChatRequest, CompletionRequest)
    app.state.service = service
    return Edge(app, service.door)


# Generating ---------------------------------------------------------------------------------------


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


async def _finish(http: Request, generation: Generation, limits: Limits) -> list[Any]:
    """Run to the end; the finish reason of each answer."""

    async def collect() -> list[Any]:
        reasons: list[Any] = [None] * len(generation.answers)
        async for updates in generation.updates():
            for update in updates:
                reasons[update.index] = update.finish_reason or reasons[update.index]
        return reasons

    with generation:
        try:
            async with asyncio.timeout(limits.request_seconds):
                return await unless_hung_up(http, collect())
        except TimeoutError:
            raise Refusal.deadline(limits.request_seconds) from None


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


def _json(reply: ChatReply | CompletionReply) -> Response:
    return Response(reply.model_dump_json(), media_type="application/json")


# Errors and the OpenAPI document ------------------------------------------------------------------


def _add_error_objects(app: FastAPI) -> None:
    """Every failure leaves as OpenAI's error object."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestError)
    async def wrong(request: Request, error: RequestError) -> Response:
        return JSONResponse(Refusal(400, str(error)).body(), 400)

    @app.exception_handler(HungUp)
    async def gone(request: Request, error: HungUp) -> Response:
        # Nobody reads it; the status is for the log.
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        sentence = {
            404: f"There is nothing at {request.method} {request.url.path[:200]}.",
            405: f"{request.url.path[:200]} does not take {request.method}.",
        }.get(error.status_code, str(error.detail))
        return JSONResponse(Refusal(error.status_code, sentence).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        message = f"The server failed ({type(error).__name__}); its log tells more under this request's id."
        return JSONResponse(Refusal(500, message).body(), 500)


def _only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: REFUSALS[status] for status in statuses}


def _body_schema(model: type[GenerationRequest]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _describe_bodies(app: FastAPI, *models: type[GenerationRequest]) -> None:
    """Put the schemas of bodies that the routes read themselves into the OpenAPI document."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in models:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        return document

    app.openapi = openapi  # type: ignore[method-assign]
