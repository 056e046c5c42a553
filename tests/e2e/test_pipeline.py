"""The whole way with the smoke recipe: text to a served model, in Prefect and MLflow, and again for nothing."""

import json
import sqlite3
from pathlib import Path

import pytest

from deepwright_core.tasks import load_problems

from .conftest import Run

STAGES = ["prepare", "pretrain", "sft", "rl", "distill", "serve"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_text_to_a_served_model_and_everything_reused_the_second_time(deepwright: Run, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    arguments = ("run", "pipeline", "experiment=smoke", f"paths.root={root}", "threads=1")
    first = deepwright(*arguments)
    assert first.returncode == 0, first.stdout + first.stderr

    results = {
        path.parent.name.split("-")[0]: json.loads(path.read_text()) for path in root.glob("stages/*/result.json")
    }
    assert sorted(results) == sorted(STAGES)
    for stage in STAGES:
        assert f"✓ {stage}" in first.stderr
    assert "deepwright serve" in first.stdout  # how to chat
    pretrain = results["pretrain"]["metrics"]
    assert pretrain["cache_saving"] >= 0.8
    assert results["serve"]["metrics"]["accuracy"] >= 0

    # The held-out problems that were asked over HTTP are test problems, with answers that were judged.
    prepare, serve = (next(root.glob(f"stages/{name}-*")) for name in ("prepare", "serve"))
    test_ids = {problem.id for problem in load_problems(prepare / "problems" / "test.jsonl")}
    answers = [json.loads(line) for line in (serve / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and {answer["problem"] for answer in answers} <= test_ids

    # One parent run with a child for each stage, and the model in the registry.
    with sqlite3.connect(root / "mlflow" / "mlflow.db") as database:
        parents = dict(
            database.execute("select t.run_uuid, t.value from tags t where t.key = 'mlflow.parentRunId'").fetchall()
        )
        models = database.execute("select name from registered_models").fetchall()
    assert len(parents) == len(STAGES) and len(set(parents.values())) == 1
    assert models == [("deepwright",)]

    second = deepwright(*arguments)
    assert second.returncode == 0, second.stdout + second.stderr
    after = {path.parent.name.split("-")[0]: json.loads(path.read_text()) for path in root.glob("stages/*/result.json")}
    assert after == results  # not one stage was done again


def test_another_learning_rate_repeats_only_what_depends_on_it(deepwright: Run, tmp_path: Path) -> None:
    arguments = ("run", "rl", "experiment=smoke", f"paths.root={tmp_path / 'runs'}", "run.workflow=none", "threads=1")
    assert deepwright(*arguments).returncode == 0
    before = {path.name for path in (tmp_path / "runs" / "stages").iterdir()}
    assert deepwright(*arguments, "rl.lr=5e-5").returncode == 0
    new = {path.name for path in (tmp_path / "runs" / "stages").iterdir()} - before
    assert [name.split("-")[0] for name in new] == ["rl"]
