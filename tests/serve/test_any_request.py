"""Requests made up from the OpenAPI document, right ones and wrong ones: never a 5xx, never an undocumented answer.

DEEPWRIGHT_FUZZ_EXAMPLES=2000 asks that many of each operation and kind instead of a few.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

EXAMPLES = int(os.environ.get("DEEPWRIGHT_FUZZ_EXAMPLES", "25"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture
def server(serve_script: Callable[..., Any]) -> Any:
    # Answers are short, and a deadline would be a documented 504: none may come.
    return serve_script("Hello, Zoë!", default_output_tokens=4)


def operations(server: Any) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    schema.config.generation.update(allow_x00=True)
    return [result.ok() for result in schema.get_all_operations()]


def whole(value: Any, most: int) -> Any:
    """Numbers that JSON Schema calls integers as integers, up to a most; everything else as it is."""
    if isinstance(value, list):
        return [whole(item, most) for item in value]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value % most if isinstance(value, int) and not isinstance(value, bool) else value


def steer(body: Any) -> Any:
    """A body made up from the schema, but for what no schema can tell: the model, ids that exist, turns in order."""
    if not isinstance(body, dict):
        return body
    steered = {name: whole(value, 300 if isinstance(value, list) else 8) for name, value in body.items()}
    steered["model"] = "tiny"
    if "messages" in steered:
        steered["messages"] = [{"role": "user", "content": str(steered["messages"])[:200]}]
    return steered


@pytest.mark.parametrize(
    "kind",
    [pytest.param("right", marks=pytest.mark.costly), "steered", pytest.param("wrong", marks=pytest.mark.costly)],
)
def test_every_operation_answers_as_documented(server: Any, kind: str) -> None:
    mode = GenerationMode.NEGATIVE if kind == "wrong" else GenerationMode.POSITIVE
    asked: dict[str, dict[int, int]] = {}
    for operation in operations(server):
        if kind != "right" and "requestBody" not in operation.definition.raw:
            continue

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            if kind == "steered":
                case.body = steer(case.body)
            response = case.call(timeout=20)
            # The schema of a stream is that of its text; this check would hold it against single events.
            events = response.headers["content-type"][0].startswith("text/event-stream")
            case.validate_response(response, checks=CHECKS, excluded_checks=[response_schema_conformance] * events)
            counts = asked.setdefault(case.operation.label, {})
            counts[response.status_code] = counts.get(response.status_code, 0) + 1

        check()
    server.until_idle()
    print(json.dumps(asked, indent=1))
    if kind == "steered":
        # What is never answered well was not asked well: the test would not test much.
        assert all(200 in counts for counts in asked.values()), asked
