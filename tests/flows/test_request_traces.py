"""Finished requests as MLflow traces."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from deepwright_core.errors import RequestError
from deepwright_core.events import RequestEvent
from flows.request_traces import EXPERIMENT, RequestTraces, taken
from flows.serve_command import serve


def event(number: int, **changes: object) -> RequestEvent:
    fields = {
        "request_id": f"req_{number}",
        "path": "/v1/chat/completions",
        "model": "tiny",
        "tenant": "alice",
        "status": 200,
        "error": "",
        "started": 1_790_000_000.0,
        "seconds": 2.0,
        "queue_seconds": 0.5,
        "first_token_seconds": 0.75,
        "prompt_tokens": 20,
        "cached_tokens": 16,
        "completion_tokens": 9,
        "reasoning_tokens": 4,
        "finish_reasons": ("stop",),
        "request": {"messages": [{"role": "user", "content": "17 + 25?"}]},
        "answers": ({"content": "42", "reasoning": "sum"},),
    }
    return RequestEvent(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def traces(tmp_path: Path) -> Iterator[RequestTraces]:
    before = mlflow.get_tracking_uri()
    yield RequestTraces(f"sqlite:///{tmp_path / 'mlflow.db'}", 1.0)
    mlflow.set_tracking_uri(before)


def test_a_trace_tells_what_was_said_and_where_the_time_went(
    traces: RequestTraces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    traces.deepwright_request_done(event(1))
    traces.deepwright_request_done(
        event(2, status=504, error="deadline_exceeded", queue_seconds=None, first_token_seconds=None, answers=())
    )
    mlflow.flush_trace_async_logging()
    experiment = mlflow.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    found = mlflow.search_traces(locations=[experiment.experiment_id], return_type="list")
    by_id = {trace.data.spans[0].attributes["request_id"]: trace for trace in found}
    done, late = by_id["req_1"], by_id["req_2"]
    whole, *parts = done.data.spans
    assert whole.inputs["messages"][0]["content"] == "17 + 25?" and whole.outputs[0]["content"] == "42"
    assert [(part.name, (part.end_time_ns - part.start_time_ns) / 1e9) for part in parts] == [
        ("waiting", 0.5),
        ("prompt", 0.25),
        ("answer", 1.25),
    ]
    assert done.info.state == "OK" and done.info.token_usage["total_tokens"] == 29
    assert late.info.state == "ERROR" and len(late.data.spans) == 1
    # Beside the database, not where somebody happens to be.
    assert experiment.artifact_location == (tmp_path / "artifacts").as_uri()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_share_is_kept_and_a_wrong_one_is_refused() -> None:
    assert 140 < sum(taken(f"req_{number}", 0.1) for number in range(2000)) < 260
    assert all(taken(f"req_{number}", 1.0) for number in range(100))
    with pytest.raises(RequestError, match="--trace-share is 2"):
        RequestTraces("sqlite:///nowhere.db", 2.0)
    with pytest.raises(RequestError, match=r"--trace-share is 0\.5, and there is no --trace-to"):
        serve.main(["nowhere", "--trace-share", "0.5"], standalone_mode=False)
