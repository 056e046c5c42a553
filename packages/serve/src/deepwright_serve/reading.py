"""Reading a request's body: bounded in size and time, strict JSON, and every fault a sentence about a field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from deepwright_core.errors import did_you_mean

from .generation import HungUp
from .limits import Limits
from .protocol.wire import Wrong
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
            asked = model.model_validate_json(body)
        except ValidationError as error:
            raise refusal(error, model, body) from None
        request.state.record.asked = asked
        return asked

    return parse


def refusal(error: ValidationError, model: type[BaseModel], body: bytes) -> Refusal:
    """One 400 that tells what is wrong in each field."""
    items = error.errors(include_url=False)
    for item in items:
        if item["type"] == "json_invalid":
            return Refusal(400, f"The body is not valid JSON: {item['ctx']['error']}.", code="invalid_json")
    sent = from_json(body)
    problems: dict[str, list[str]] = {}
    for item in items:
        path = _path(item, sent)
        problems.setdefault(path, []).append(_sentence(item, path, model))
    # Of a field of several types, what is wrong inside of it says more than that it is none of the others.
    problems = {path: found for path, found in problems.items() if not any(p.startswith(f"{path}.") for p in problems)}
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


def _path(item: Any, sent: Any) -> str:
    """The field's path as the client wrote it: without pydantic's names for the members of a union, which are in the
    location but not in what was sent."""
    location = item["loc"]
    kept = _found(location, sent)
    if item["type"] == "extra_forbidden" and kept[-1] != location[-1]:
        # The name of a member was taken for the field that bears the same name.
        kept = max((_found((*location[:n], *location[n + 1 :]), sent) for n in range(len(location) - 1)), key=len)
    if item["type"] == "missing":
        kept.append(str(location[-1]))
    elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        kept.append(item["ctx"]["discriminator"].strip("'"))
    elif item["type"] == "value_error" and isinstance(item["ctx"]["error"], Wrong):
        kept.append(item["ctx"]["error"].field)
    return ".".join(kept)[:200]


def _found(location: Sequence[int | str], sent: Any) -> list[str]:
    """The parts of a location that lead somewhere in what was sent."""
    kept: list[str] = []
    for part in location:
        within = isinstance(sent, dict) and part in sent
        if within or (isinstance(sent, list) and isinstance(part, int) and part < len(sent)):
            kept.append(str(part))
            sent = sent[part]
    return kept


def _sentence(item: Any, path: str, model: type[BaseModel]) -> str:
    if item["type"] == "extra_forbidden":
        known = f" {did_you_mean(path, model.model_fields)}" if "." not in path else ""
        return f"{path} is not a field that this server knows.{known}"
    if item["type"] in ("missing", "union_tag_not_found"):
        return f"{path} is missing; give it a value"
    if item["type"] == "union_tag_invalid":
        return f"{path} is {_shown(item['ctx']['tag'])}; expected one of {item['ctx']['expected_tags']}"
    if item["type"] == "value_error":
        wrong = item["ctx"]["error"]
        return f"{path} {wrong.rest}" if isinstance(wrong, Wrong) else str(wrong)
    message = item["msg"][0].lower() + item["msg"][1:]
    return f"{path or 'The body'} is {_shown(item['input'])}; {message}"


def _shown(value: Any) -> str:
    # true, null and NaN as the client wrote them, not as Python does.
    text = json.dumps(value) if value is None or isinstance(value, bool | float) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
