"""The OpenAPI document: what FastAPI does not find by itself, because the routes read their bodies on their own."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from .refusal import ErrorReply

Responses = dict[int | str, dict[str, Any]]


def refusals(*statuses: int, closed: bool = True) -> Responses:
    """The error objects that a route may answer with: these, and what can happen to any request.

    closed: whether the route needs a key, where there are keys.
    """
    door = (401, 403, 429, 431, 500, 503) if closed else (403, 431, 500, 503)
    # Written out, because a `model` would get the route's own media type, and the page's is text/html.
    error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{ErrorReply.__name__}"}}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": error} for status in sorted({*door, *statuses})
    }


# What reading a body may come to.
BODY = (400, 408, 413, 415)
# The text of /metrics, in whichever of its forms was asked for.
METRICS: Responses = {
    200: {"description": "Every series", "content": {"text/plain": {"schema": {"type": "string"}}}},
    **refusals(),
}


def answers(chunk: type[BaseModel]) -> Responses:
    """The responses of a route that generates: its reply, or (stream: true) events that each hold a `chunk`."""
    events = {
        "type": "string",
        "description": f"Server-sent events. The data of each is a {chunk.__name__} (as JSON), an error object, or, "
        "at the end, [DONE].",
    }
    return {
        200: {"description": "The answer", "content": {"text/event-stream": {"schema": events}}},
        **refusals(*BODY, 404, 504),
    }


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What a route declares whose body is a `model`."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe_bodies(app: FastAPI, *models: type[BaseModel]) -> None:
    """Put the schemas of bodies that the routes read themselves into the OpenAPI document."""
    _describe(app, models, "validation")


def describe_events(app: FastAPI, *models: type[BaseModel]) -> None:
    """Put the schemas of what streams are made of into the OpenAPI document."""
    _describe(app, models, "serialization")


def _describe(app: FastAPI, models: Sequence[type[BaseModel]], mode: Literal["validation", "serialization"]) -> None:
    build = app.openapi

    def openapi() -> dict[str, Any]:
        document = build()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in models:
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode=mode)
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        return document

    app.openapi = openapi  # type: ignore[method-assign]
