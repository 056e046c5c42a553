"""The serve stage on a tiny model: held-out problems asked over HTTP, judged, written, the server gone or kept."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from deepwright_core import plugins
from deepwright_core.errors import RequestError
from deepwright_core.stage import Stage, StageContext
from deepwright_core.tasks import Problem, dump_problems, score
from deepwright_core.tracking import JsonlTracker, SilentProgress
from deepwright_serve import command
from deepwright_serve import stage as serve_stage
from deepwright_serve.engine_options import EngineOptions


def problem(number: int) -> Problem:
    question = f"State the final answer to the following arithmetic problem: {number} + 1 ="
    return Problem(f"{number:064x}", "chain_sum", question, str(number + 1), {}, "")


def context_of(model: Path, directory: Path, problems: list[Problem]) -> StageContext:
    held_out = directory / "problems"
    held_out.mkdir(parents=True)
    (held_out / "test.jsonl").write_text(dump_problems(problems))
    return StageContext(
        directory=directory / "serve",
        tracker=JsonlTracker(directory / "metrics.jsonl"),
        progress=SilentProgress(),
        registry=plugins.installed().registry,
        hook=None,
        inputs={"rl_model": model, "problems": held_out},
    )


def sections(**fields: Any) -> dict[str, Any]:
    config = serve_stage.ServeConfig(max_tokens=8, cache_tokens=1024, **fields)
    return {"serve": config, "precision": "fp32", "threads": 1}


def test_it_is_registered() -> None:
    component = plugins.installed().registry.get("stage", "serve")
    assert component.config is serve_stage.ServeConfig
    built = component.build(serve_stage.ServeConfig())
    assert isinstance(built, Stage) and built.needs == {"rl_model": "rl", "problems": "prepare"}


def test_its_options_of_the_engine_are_those_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = serve_stage.ServeConfig(
        cache_tokens=128,
        cache_dtype="fp8",
        replicas=2,
        speculate=1,
        adapters={"poet": str(tmp_path / "a=b"), "b/c": "relative"},
        batch_invariant=True,
        expert_parallel=3,
    )
    heard: dict[str, Any] = {}
    monkeypatch.setattr(command, "serve", lambda model, **options: heard.update(options))
    command.serve_command.main(["model", *config.arguments()], standalone_mode=False)
    want = {name: getattr(config, name) for name in EngineOptions.model_fields}
    want["adapters"] = {"poet": str(tmp_path / "a=b"), "b/c": str(Path("relative").resolve())}
    assert heard["engine"] == EngineOptions(**want)
    command.serve_command.main(["model", *serve_stage.ServeConfig().arguments()], standalone_mode=False)
    assert heard["engine"] == EngineOptions()


def test_an_adapter_cannot_have_the_models_name() -> None:
    with pytest.raises(ValidationError, match="the model's own name"):
        serve_stage.ServeConfig(model_name="poet", adapters={"poet": "x"})


@pytest.mark.costly
def test_it_asks_judges_and_stops(model_directory: Path, tmp_path: Path) -> None:
    problems = [problem(number) for number in range(6)]
    context = context_of(model_directory, tmp_path, problems)
    result = serve_stage.run(sections(problems=5, concurrency=3), context)
    lines = [json.loads(line) for line in (context.directory / result.outputs["answers"]).read_text().splitlines()]
    assert [line["problem"] for line in lines] == [p.id for p in problems[:5]]
    for line, asked in zip(lines, problems, strict=False):
        assert line["question"] == asked.question and line["tokens"] <= 8
        assert line["correct"] == (score(asked, line["answer"]) >= 1.0)
        assert 0 < line["first_token"] <= line["latency"]
    assert result.metrics["accuracy"] == sum(line["correct"] for line in lines) / 5
    assert result.headline == ("HTTP accuracy", None, result.metrics["accuracy"])
    assert result.tokens == sum(line["tokens"] for line in lines) > 0
    assert "server" not in result.outputs
    record = json.loads((context.directory / "server" / "address.json").read_text())
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{record['address']}/ready")


def test_it_leaves_the_server_up_when_told(model_directory: Path, tmp_path: Path) -> None:
    context = context_of(model_directory, tmp_path, [problem(1)])
    result = serve_stage.run(sections(keep=True), context)
    record = json.loads((context.directory / result.outputs["server"]).read_text())
    try:
        assert httpx.get(f"{record['address']}/ready").status_code == 200
        assert os.getsid(record["pid"]) == record["pid"]
    finally:
        os.kill(record["pid"], signal.SIGTERM)


def test_no_problems_is_said_before_anything_starts(model_directory: Path, tmp_path: Path) -> None:
    context = context_of(model_directory, tmp_path, [])
    with pytest.raises(RequestError, match="holds no problem"):
        serve_stage.run(sections(), context)
    assert not context.directory.exists()
