"""What MLflow remembers: one run for a run, one for a stage, no point twice, nothing left running."""

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepwright_core.errors import WorkError
from deepwright_core.hookspecs import hookimpl
from deepwright_core.plugins import Plugins
from flows import metric_plots, mlflow_tracker, request, session
from flows.mlflow_tracker import PARENT_TAG, PROCESS_TAG
from flows.run_tracking import METRICS_FILE

Go = Callable[..., session.Report]


def runs(client: Any) -> dict[str, Any]:
    """Runs by name; the parent is called "parent"."""
    experiment = client.get_experiment_by_name("deepwright")
    found = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    return {run.info.run_name if PARENT_TAG in run.data.tags else "parent": run for run in found}


def test_a_run_has_a_child_for_each_stage_and_all_that_belongs_to_it(client: Any, go: Go, tmp_path: Path) -> None:
    report = go("pipeline", "tracking=mlflow", "learn.steps=8")
    found = runs(client)
    parent, learn = found["parent"], found["learn"]
    assert set(found) == {"parent", "gather", "learn", "judge"}
    assert all(run.info.status == "FINISHED" for run in found.values())
    assert learn.data.tags[PARENT_TAG] == parent.info.run_id
    assert learn.data.params["learn.steps"] == "8" and parent.data.params["optimizer.name"] == "walk"
    assert parent.data.metrics["learn/total"] == learn.data.metrics["final/total"] == 28.0
    assert "0 → 28" in parent.data.tags["mlflow.note.content"]

    def files(run: Any, folder: str = "") -> set[str]:
        return {f.path for f in client.list_artifacts(run.info.run_id, folder)}

    assert {"config.yaml", "environment.json", "summary.md"} <= files(parent)
    assert files(learn, "outputs/model") == {"outputs/model/model.safetensors", "outputs/model/config.json"}
    assert files(learn, "plots") == {"plots/metrics.png"}
    assert files(found["judge"], "samples") == {"samples/verdict.txt"}
    assert learn.info.artifact_uri.startswith((tmp_path / "runs" / "mlflow").as_uri())
    record = json.loads((report.outcomes[1].directory / "result.json").read_text())
    assert record["tracking"]["run_id"] == learn.info.run_id


def test_a_reused_stage_points_to_the_run_that_made_it(client: Any, go: Go) -> None:
    go("learn", "tracking=mlflow")
    made = runs(client)["learn"]
    go("learn", "tracking=mlflow")
    experiment = client.get_experiment_by_name("deepwright").experiment_id
    latest = client.search_runs([experiment], order_by=["attributes.start_time DESC"])[0]
    assert latest.data.tags["deepwright.reused.learn"] == made.info.run_id
    assert len(client.search_runs([experiment])) == 4  # two parents, and one child for each stage


class Plug:
    """Pulls the plug once, at a step that is no checkpoint."""

    def __init__(self, how: type[BaseException]) -> None:
        self.how = how
        self.pulled = False

    @hookimpl
    def deepwright_checkpoint_saved(self, event: Any) -> None:
        if event.step == 10 and not self.pulled:
            self.pulled = True
            raise self.how("pulled")


def points(client: Any, run: Any, key: str) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, key)]


@pytest.mark.parametrize(("how", "status"), [(OSError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_resumed_stage_goes_on_in_its_run_and_repeats_no_point(
    client: Any, go: Go, plugins: Plugins, how: type[BaseException], status: str
) -> None:
    plug = Plug(how)
    plugins.manager.register(plug)
    try:
        with pytest.raises((WorkError, KeyboardInterrupt)):
            go("learn", "tracking=mlflow")
        assert {runs(client)[name].info.status for name in ("parent", "learn")} == {status}
        first = runs(client)["learn"]
        # The attempt had logged more than its last checkpoint holds.
        client.log_metric(first.info.run_id, "total", 55.0, step=11)
        go("learn", "tracking=mlflow")
    finally:
        plugins.manager.unregister(plug)
    learn = runs(client)["learn"]
    assert learn.info.run_id == first.info.run_id and learn.info.status == "FINISHED"
    history = points(client, learn, "total")
    assert sorted(step for step, _ in history) == list(range(1, 21))
    assert learn.data.tags[PARENT_TAG] != first.data.tags[PARENT_TAG]


def test_the_same_holds_for_json_lines(go: Go, plugins: Plugins) -> None:
    plug = Plug(OSError)
    plugins.manager.register(plug)
    try:
        with pytest.raises(WorkError) as error:
            go("learn")
        assert "pulled" in str(error.value)
        path = next(Path(request.make("learn", [], plugins).root).glob(f"stages/learn-*/{METRICS_FILE}"))
        with path.open("a") as file:
            file.write('{"step": 11, "total": 55.0, "loss": 0.1}\n{"step": 12, "to')  # cut off in a line
        go("learn")
    finally:
        plugins.manager.unregister(plug)
    steps = []
    for line in path.read_text().splitlines():
        try:
            steps.append(json.loads(line).get("step"))
        except ValueError:
            continue
    assert [step for step in steps if step is not None] == list(range(1, 21))


def test_runs_of_dead_processes_are_swept(client: Any, go: Go) -> None:
    go("gather", "tracking=mlflow")
    run = runs(client)["gather"]
    client.update_run(run.info.run_id, status="RUNNING")
    client.set_tag(run.info.run_id, PROCESS_TAG, mlflow_tracker.this_process())
    mlflow_tracker.sweep(client, run.info.experiment_id)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    host, _, created = mlflow_tracker.this_process().rsplit(":", 2)
    client.set_tag(run.info.run_id, PROCESS_TAG, f"{host}:999999999:{created}")
    mlflow_tracker.sweep(client, run.info.experiment_id)
    assert client.get_run(run.info.run_id).info.status == "KILLED"


def test_the_final_model_is_registered_once_with_its_lineage(client: Any, go: Go) -> None:
    report = go("pipeline", "tracking=mlflow")
    go("pipeline", "tracking=mlflow")
    (version,) = client.search_model_versions("name = 'deepwright'")
    champion = client.get_model_version_by_alias("deepwright", "champion")
    assert champion.version == version.version
    assert champion.run_id == runs(client)["learn"].info.run_id
    assert champion.tags["stage"] == "learn"
    assert champion.tags["stage.gather"] == report.outcomes[0].identity
    files = {f.path for f in client.list_artifacts(champion.run_id, "registered_model")}
    assert "registered_model/MLmodel" in files
    go("pipeline", "tracking=mlflow", "optimizer.pace=3")
    # A later one is a candidate: it becomes champion by `deepwright promote`.
    assert client.get_model_version_by_alias("deepwright", "candidate").version != version.version
    assert client.get_model_version_by_alias("deepwright", "champion").version == version.version


def test_a_large_output_is_kept_by_its_path(client: Any, go: Go) -> None:
    go("gather", "tracking=mlflow", "tracking.artifact_limit_mb=1e-6")
    run = runs(client)["gather"]
    assert [f.path for f in client.list_artifacts(run.info.run_id, "outputs")] == ["outputs/numbers.txt.location.json"]


def test_a_tracker_that_fails_does_not_stop_the_work(
    client: Any, go: Go, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr("mlflow.MlflowClient.log_batch", refuse)
    report = go("learn", "tracking=mlflow")
    assert report.outcomes[1].result.metrics == {"total": 190.0}
    assert any("database is locked" in r.message for r in caplog.records)


def test_a_database_that_cannot_be_used_is_a_sentence(go: Go, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mlflow"
    folder.mkdir(parents=True)
    (folder / "mlflow.db").write_text("this is no database, and longer than a header of one hundred bytes " * 3)
    with pytest.raises(WorkError, match="MLflow cannot be used at sqlite"):
        go("gather", "tracking=mlflow")


def test_plots_hold_what_has_at_least_two_points(tmp_path: Path) -> None:
    curve = [(1, 2.0), (2, 1.0)]
    histories = {"loss": curve, "reward/a": curve, "reward/b": curve, "x": curve[:1]}
    names = [path.name for path in metric_plots.draw(histories, tmp_path)]
    assert names == ["metrics.png", "reward.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert metric_plots.draw({"x": [(1, 1.0)]}, tmp_path) == []
