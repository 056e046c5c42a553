"""A model by what people call it: a directory, a stage's run, the whole run, a registered name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deepwright_core.errors import RequestError
from deepwright_core.plugins import Plugins
from flows import session
from flows.model_source import locate


@pytest.fixture
def made(client: MlflowClient, go: Callable[..., session.Report]) -> tuple[session.Report, str, str]:
    """A tracked run of the toy pipeline, the run id of the stage that made its model, and that of the whole."""
    report = go("pipeline", "tracking=mlflow")
    learn = next(outcome for outcome in report.outcomes if outcome.stage == "learn")
    stage_run = learn.finished.record["tracking"]["run_id"]
    parent = client.get_run(stage_run).data.tags["mlflow.parentRunId"]
    return report, stage_run, parent


def test_every_name_leads_to_the_same_directory(
    made: tuple[session.Report, str, str], client: MlflowClient, go: Callable[..., session.Report], plugins: Plugins
) -> None:
    report, stage_run, parent = made
    learn = next(outcome for outcome in report.outcomes if outcome.stage == "learn")
    model = learn.directory / "model"
    assert locate(str(model), plugins) == locate(str(learn.directory), plugins) == model
    assert locate(stage_run, plugins) == locate(parent, plugins) == model
    for name in ("deepwright@champion", "models:/deepwright@champion", "deepwright/1"):
        assert locate(name, plugins) == model
    # A second run makes nothing new: it points to the runs whose stages it reused.
    go("pipeline", "tracking=mlflow")
    again = [run.info.run_id for run in client.search_runs(["1"], "tags.`deepwright.target` = 'pipeline'")]
    assert len(again) == 2 and {locate(run, plugins) for run in again} == {model}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("0123456789abcdef0123456789abcdef", "is not known to the tracker"),
        ("deepwright@nobody", "is not known to the tracker"),
        ("deepwright/77", "is not known to the tracker"),
        ("nowhere/at/all", "is no directory, no run id"),
    ],
)
def test_unknown_names(made: tuple[session.Report, str, str], plugins: Plugins, name: str, words: str) -> None:
    with pytest.raises(RequestError, match=re.escape(words)):
        locate(name, plugins)


def test_a_run_whose_directory_is_gone(made: tuple[session.Report, str, str], plugins: Plugins) -> None:
    report, stage_run, _ = made
    shutil.rmtree(Path(report.outcomes[1].directory))
    with pytest.raises(RequestError, match="left no model that is still on the disk"):
        locate(stage_run, plugins)
