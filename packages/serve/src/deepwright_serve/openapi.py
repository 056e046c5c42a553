"""The OpenAPI document: what FastAPI does not find by itself, because the routes read their bodies on their own."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from .refusal import ErrorReply

REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply} for status in (400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 503, 504)
}


# The text of /metrics, in whichever of its forms was asked for.
METRICS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Every series", "content": {"text/plain": {"schema": {"type": "string"}}}},
    401: {"model": ErrorReply},
}


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of the refusals, those with these statuses."""
    return {status: REFUSALS[status] for status in statuses}


def body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What a route declares whose body is a `model`."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe_bodies(app: FastAPI, *models: type[BaseModel]) -> None:
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
