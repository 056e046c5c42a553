"""The application: routes over a roster of models.

A chat request goes: body -> `protocol.ChatRequest` -> prompt ids (chat form) -> `Generation` -> JSON or SSE.
Left out: tools, structured output, log-probabilities, metrics for dashboards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from . import page
from .admin import add_admin_routes
from .chat import answer_chat
from .completion import complete_text
from .edge import Edge
from .errors import add_error_objects
from .openapi import METRICS, REFUSALS, body_schema, describe_bodies, only
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
from .refusal import ErrorReply
from .roster import Served
from .service import Service


def create_app(service: Service) -> Edge:
    """The ASGI application of a service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.roster.start()
        yield
        await service.roster.stop()

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
        service.require_ready()
        return Status()

    @app.get("/health", response_model=Status, responses={503: {"model": ErrorReply}}, summary="Does it generate?")
    async def health() -> Status:
        await service.prove_alive()
        return Status()

    @app.get("/metrics", responses=METRICS, response_class=Response, summary="Counts and times, for Prometheus")
    async def metrics(http: Request) -> Response:
        body, kind = service.metrics.expose(http.headers.get("accept", ""))
        return Response(body, headers={"content-type": kind})

    def card(served: Served) -> ModelCard:
        return ModelCard(id=served.name, created=served.created, max_model_len=served.context)

    @app.get("/v1/models", response_model=ModelList, responses={401: {"model": ErrorReply}})
    async def models() -> ModelList:
        return ModelList(data=[card(served) for served in service.roster.models()])

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=only(401, 404))
    async def model(name: str) -> ModelCard:
        return card(service.roster.find(name))

    @app.post(
        "/v1/chat/completions",
        response_model=ChatReply,
        responses=REFUSALS,
        openapi_extra=body_schema(ChatRequest),
        summary="Answer a conversation",
    )
    async def chat_completions(http: Request, request: ChatRequest = chat_body) -> Response:
        with service.roster.lease(request.model, service.door.is_operator(http.headers)) as served:
            return await answer_chat(service, served, http, request)

    @app.post(
        "/v1/completions",
        response_model=CompletionReply,
        responses=REFUSALS,
        openapi_extra=body_schema(CompletionRequest),
        summary="Continue a text",
    )
    async def completions(http: Request, request: CompletionRequest = completion_body) -> Response:
        with service.roster.lease(request.model, service.door.is_operator(http.headers)) as served:
            return await complete_text(service, served, http, request)

    describe_bodies(app, ChatRequest, CompletionRequest)
    if service.changes is not None:
        add_admin_routes(app, service, service.changes)
    app.state.service = service
    return Edge(app, service.door, service.metrics)
