"""The application: routes over a roster of models.

A chat request goes: body -> `protocol.ChatRequest` -> prompt ids (chat form) -> `Generation` -> JSON or SSE.
Left out: embeddings, responses, files and the rest of OpenAI's routes; what is there is real.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from . import page
from .admin import add_admin_routes
from .chat import answer_chat
from .completion import complete_text
from .edge import Edge
from .errors import add_error_objects
from .metrics import CONTENT_TYPE
from .openapi import BODY, METRICS, answers, body_schema, describe_bodies, describe_events, refusals
from .protocol import (
    ChatChunk,
    ChatReply,
    ChatRequest,
    CompletionReply,
    CompletionRequest,
    DetokenizeReply,
    DetokenizeRequest,
    ModelCard,
    ModelList,
    Status,
    TokenizeReply,
    TokenizeRequest,
    Version,
)
from .reading import body_of
from .refusal import ErrorReply
from .service import Service
from .tokens import to_text, to_tokens


def create_app(service: Service) -> Edge:
    """The ASGI application of a service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.roster.start()
        if service.teller is not None:
            service.teller.start()
        yield
        await service.roster.stop()
        if service.teller is not None:
            await asyncio.to_thread(service.teller.stop)

    app = FastAPI(
        title="deepwright",
        description="OpenAI-compatible endpoints over deepwright's engine.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    add_error_objects(app)
    chat_page = page.load()
    chat_body = Depends(body_of(ChatRequest, service.limits))
    completion_body = Depends(body_of(CompletionRequest, service.limits))
    tokenize_body = Depends(body_of(TokenizeRequest, service.limits))
    detokenize_body = Depends(body_of(DetokenizeRequest, service.limits))

    @app.get("/", response_class=HTMLResponse, responses=refusals(closed=False), summary="The chat page")
    async def chat_window() -> Response:
        return HTMLResponse(chat_page.html, headers={"content-security-policy": chat_page.policy})

    @app.get("/ready", response_model=Status, responses=refusals(closed=False), summary="May requests be sent?")
    async def ready() -> Status:
        service.require_ready()
        return Status()

    @app.get("/health", response_model=Status, responses=refusals(closed=False), summary="Does it generate?")
    async def health() -> Status:
        await service.prove_alive()
        return Status()

    @app.get("/metrics", responses=METRICS, response_class=Response, summary="Counts and times, for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.expose(), headers={"content-type": CONTENT_TYPE})

    @app.get("/version", response_model=Version, responses=refusals(), summary="The version of the server")
    async def version() -> Version:
        return Version(version=metadata.version("deepwright-serve"))

    @app.get("/v1/models", response_model=ModelList, responses=refusals(), summary="What can be asked")
    async def models() -> ModelList:
        return ModelList(data=service.cards())

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=refusals(404), summary="One of the models")
    async def model(name: str) -> ModelCard:
        wanted = service.roster.find(name)
        return next(card for card in service.cards() if card.id == wanted.name)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatReply,
        responses=answers(ChatChunk),
        openapi_extra=body_schema(ChatRequest),
        summary="Answer a conversation",
    )
    async def chat_completions(http: Request, request: ChatRequest = chat_body) -> Response:
        with service.roster.lease(request.model, service.door.is_operator(http.headers)) as served:
            return await answer_chat(service, served, http, request)

    @app.post(
        "/v1/completions",
        response_model=CompletionReply,
        responses=answers(CompletionReply),
        openapi_extra=body_schema(CompletionRequest),
        summary="Continue a text",
    )
    async def completions(http: Request, request: CompletionRequest = completion_body) -> Response:
        with service.roster.lease(request.model, service.door.is_operator(http.headers)) as served:
            return await complete_text(service, served, http, request)

    @app.post(
        "/tokenize",
        response_model=TokenizeReply,
        responses=refusals(*BODY, 404),
        openapi_extra=body_schema(TokenizeRequest),
        summary="A text or a conversation as token ids",
    )
    async def tokenize(http: Request, request: TokenizeRequest = tokenize_body) -> TokenizeReply:
        operator = service.door.is_operator(http.headers)
        with service.roster.lease(request.model or service.first, operator) as served:
            return await asyncio.to_thread(to_tokens, served, request)

    @app.post(
        "/detokenize",
        response_model=DetokenizeReply,
        responses=refusals(*BODY, 404),
        openapi_extra=body_schema(DetokenizeRequest),
        summary="Token ids as text",
    )
    async def detokenize(http: Request, request: DetokenizeRequest = detokenize_body) -> DetokenizeReply:
        operator = service.door.is_operator(http.headers)
        with service.roster.lease(request.model or service.first, operator) as served:
            return await asyncio.to_thread(to_text, served, request)

    describe_bodies(app, ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    describe_events(app, ChatChunk, ErrorReply)
    if service.changes is not None:
        add_admin_routes(app, service, service.changes)
    app.state.service = service
    return Edge(app, service.door, service.metrics, service.teller)
