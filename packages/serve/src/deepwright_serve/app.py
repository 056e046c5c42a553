"""The application: routes over one engine.

A chat request goes: body -> `protocol.ChatRequest` -> prompt ids (chat form) -> `Generation` -> JSON or SSE.
Left out: tools, structured output, log-probabilities, metrics for dashboards, several models at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from . import page
from .chat import answer_chat
from .completion import complete_text
from .edge import Edge
from .errors import add_error_objects
from .openapi import REFUSALS, body_schema, describe_bodies, only
from .protocol import (
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    ModelCard,
    ModelList,
    Status,
)
from .reading import body_of
from .refusal import ErrorReply, Refusal
from .service import Service


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
    add_error_objects(app)
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

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=only(401, 404))
    async def model(name: str) -> ModelCard:
        service.require_model(name)
        return card()

    @app.post(
        "/v1/chat/completions",
        response_model=ChatReply,
        responses=REFUSALS,
        openapi_extra=body_schema(ChatRequest),
        summary="Answer a conversation",
    )
    async def chat_completions(http: Request, request: ChatRequest = chat_body) -> Response:
        return await answer_chat(service, http, request)

    @app.post(
        "/v1/completions",
        response_model=CompletionReply,
        responses=REFUSALS,
        openapi_extra=body_schema(CompletionRequest),
        summary="Continue a text",
    )
    async def completions(http: Request, request: CompletionRequest = completion_body) -> Response:
        return await complete_text(service, http, request)

    describe_bodies(app, ChatRequest, CompletionRequest)
    app.state.service = service
    return Edge(app, service.door)
