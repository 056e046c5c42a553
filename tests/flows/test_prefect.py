"""Runs as Prefect sees them: a flow, a subflow and a task for each stage, and what the pages of a run show."""

import subprocess
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from flows import form_fields

Deepwright = Callable[..., subprocess.CompletedProcess[str]]


def ask(api: str, what: str, **filters: Any) -> list[dict[str, Any]]:
    answer = httpx.post(f"{api}/{what}/filter", json=filters, timeout=30)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()
    return found


def newest(api: str, flow: str) -> dict[str, Any]:
    runs = ask(api, "flow_runs", flows={"name": {"any_": [flow]}}, sort="START_TIME_DESC")
    return runs[0]


def test_a_run_is_a_flow_with_a_subflow_for_each_stage(prefect_api: str, deepwright: Deepwright) -> None:
    overrides = ["run.workflow=prefect", "learn.steps=6"]
    done = deepwright("run", "pipeline", *overrides, PREFECT_API_URL=prefect_api)
    assert done.returncode == 0, done.stderr
    assert "0 → 15" in done.stdout and "prefect" not in done.stderr.lower()
    run = newest(prefect_api, "pipeline")
    assert run["state_type"] == "COMPLETED"
    assert run["parameters"]["overrides"] == overrides
    for stage in ("gather", "learn", "judge"):
        assert newest(prefect_api, f"{stage} stage")["state_type"] == "COMPLETED"
    summaries = ask(prefect_api, "artifacts", artifacts={"key": {"any_": ["summary"]}})
    (summary,) = [artifact for artifact in summaries if artifact["flow_run_id"] == run["id"]]
    assert "| learn | done |" in summary["data"]
    logs = ask(prefect_api, "logs", logs={"flow_run_id": {"any_": [run["id"]]}})
    assert any("learn" in line["message"] and "0 → 15" in line["message"] for line in logs)
    tasks = ask(prefect_api, "task_runs", flow_runs={"id": {"any_": [newest(prefect_api, "learn stage")["id"]]}})
    assert [t["state_name"] for t in tasks] == ["Completed"]

    again = deepwright("run", "pipeline", *overrides, PREFECT_API_URL=prefect_api)
    assert again.returncode == 0 and again.stderr.count("reused") == 3
    tasks = ask(prefect_api, "task_runs", flow_runs={"id": {"any_": [newest(prefect_api, "learn stage")["id"]]}})
    assert [t["state_name"] for t in tasks] == ["Cached"]


def test_failures_and_wrong_requests_end_the_flow_as_they_end_the_command(
    prefect_api: str, deepwright: Deepwright
) -> None:
    failed = deepwright("run", "learn", "run.workflow=prefect", "learn.fail=crash", PREFECT_API_URL=prefect_api)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "deepwright: learn failed: ValueError: the numbers do not add up" in failed.stderr
    assert newest(prefect_api, "learn")["state_type"] == "FAILED"
    assert "do not add up" in newest(prefect_api, "learn")["state"]["message"]


def test_a_choice_of_the_form_is_an_override() -> None:
    assert form_fields.overrides_for(experiment="smoke", model="", attention="mla") == [
        "experiment=smoke",
        "model/attention=mla",
    ]


@pytest.mark.parametrize("field", list(form_fields.GROUPS))
def test_every_field_of_the_form_has_a_group(field: str) -> None:
    assert form_fields.overrides_for(**{field: "x"}) == [f"{form_fields.GROUPS[field]}=x"]
