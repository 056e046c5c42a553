"""Reading a request's body: bounded in size and time, strict JSON, and every fault a sentence about a field."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from deepwright_core.errors import did_you_mean

from .generation import HungUp
from .limits import Limits
from .refusal import Refusal

Model = TypeVar("Model", bound=BaseModel)
SHOWN = 4


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body, or a refusal as soon as it is too large or too slow."""
    too_large = Refusal(413, f"The body is larger than {limits.body_bytes} bytes; send less.", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, f"The body did not arrive within {limits.body_seconds:g} s.", code="timeout") from None
    except ClientDisconnect:
        raise HungUp from None
    return bytes(body)


def body_of(model: type[Model], limits: Limits) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads and checks a body."""

    async def parse(request: Request) -> Model:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            # Also what keeps other sites' pages from posting here: this content type makes a browser ask first.
            raise Refusal(
                415, f"The body's content type is '{kind}'; send application/json.", code="unsupported_media_type"
            )
        body = await read_body(request, limits)
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            raise refusal(error, model) from None

    return parse


def refusal(error: ValidationError, model: type[BaseModel]) -> Refusal:
    """One 400 that tells what is wrong in each field."""
    problems: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        if item["type"] == "json_invalid":
            return Refusal(400, f"The body is not valid JSON: {item['ctx']['error']}.", code="invalid_json")
        path = _path(item)
        problems.setdefault(path, []).append(_sentence(item, path, model))
    sentences = []
    for path, found in list(problems.items())[:SHOWN]:
        # A field of several types fails once for each of them: say what it holds once.
        expected = [text.removeprefix(f"{path} is ") for text in dict.fromkeys(found)]
        first = (
            found[0] if len(expected) == 1 else f"{path} is none of the forms it may have: {'; '.join(expected[:3])}"
        )
        sentences.append(first.rstrip(".") + ".")
    if len(problems) > SHOWN:
        sentences.append(f"{len(problems) - SHOWN} more fields are wrong.")
    return Refusal(400, " ".join(sentences), param=next(iter(problems)) or None, code="invalid_value")


def _path(item: Any) -> str:
    """The field's path as the client wrote it: without pydantic's names for the members of a union."""
    kept = []
    for place, part in enumerate(item["loc"]):
        last = place == len(item["loc"]) - 1 and item["type"] in ("extra_forbidden", "missing")
        if isinstance(part, int) or last or (part.isidentifier() and part not in ("str", "int", "float", "bool")):
            kept.append(str(part))
    return ".".join(kept)[:200]


def _sentence(item: Any, path: str, model: type[BaseModel]) -> str:
    if item["type"] == "extra_forbidden":
        known = f" {did_you_mean(path, model.model_fields)}" if "." not in path else ""
        return f"{path} is not a field that this server knows.{known}"
    if item["type"] == "missing":
        return f"{path} is missing; give it a value"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    shown = repr(item["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "…"
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{path} is {shown}; {message}" if path else f"The body is {shown}; {message}"
