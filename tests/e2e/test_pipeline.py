"""The whole way with the smoke recipe: text to a served model, in Prefect and MLflow, and again for nothing."""

import json
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deepwright_core.tasks import load_problems

from .conftest import Run, run_in

SMOKE = ("experiment=smoke", "threads=1")
STAGES = ["prepare", "pretrain", "sft", "rl", "distill", "serve"]


Results = dict[str, dict[str, Any]]


def results(root: Path) -> Results:
    """What stands in each stage's result, by the stage's directory."""
    return {path.parent.name: json.loads(path.read_text()) for path in root.glob("stages/*/result.json")}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, subprocess.CompletedProcess[str], Results]":
    """The root of a pipeline on a fresh machine, how it ended, and the results it left."""
    root = tmp_path_factory.mktemp("pipeline") / "runs"
    done = run_in(root.parent, "run", "pipeline", *SMOKE, f"paths.root={root}")
    return root, done, results(root)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_text_to_a_served_model_and_everything_reused_the_second_time(
    first: "tuple[Path, subprocess.CompletedProcess[str], Results]", deepwright: Run
) -> None:
    root, done, found = first
    assert done.returncode == 0, done.stdout + done.stderr

    by_stage = {name.split("-")[0]: result for name, result in found.items()}
    assert sorted(by_stage) == sorted(STAGES) and len(found) == len(STAGES)
    for stage in STAGES:
        assert f"✓ {stage}" in done.stderr
    assert "deepwright serve" in done.stdout  # how to chat
    pretrain = by_stage["pretrain"]["metrics"]
    assert pretrain["cache_saving"] >= 0.8
    assert by_stage["serve"]["metrics"]["accuracy"] >= 0

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

    second = deepwright("run", "pipeline", *SMOKE, f"paths.root={root}")
    assert second.returncode == 0, second.stdout + second.stderr
    after = results(root)
    assert {name: after[name] for name in found} == found  # not one stage was done again
    assert second.stderr.count("reused") == len(STAGES)


@pytest.mark.timeout(400)
def test_another_learning_rate_repeats_only_what_depends_on_it(
    first: "tuple[Path, subprocess.CompletedProcess[str], Results]", deepwright: Run
) -> None:
    root, done, found = first
    assert done.returncode == 0, done.stderr
    again = deepwright("run", "rl", *SMOKE, f"paths.root={root}", "run.workflow=none", "rl.lr=5e-5")
    assert again.returncode == 0, again.stderr
    assert [name.split("-")[0] for name in results(root).keys() - found.keys()] == ["rl"]
