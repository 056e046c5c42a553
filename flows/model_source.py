"""What people call a model on the command line: a directory, a tracked run's id, or a registered name.

A run id is a stage's, or the whole pipeline's: then the last model that was made or reused in it is meant. A registered
name is `deepwright@champion` or `deepwright/3`, with or without `models:/` before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from deepwright_core.errors import RequestError
from deepwright_core.model.directory import find_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from deepwright_core.plugins import Plugins

RUN_ID = re.compile(r"[0-9a-f]{32}")
REGISTERED = re.compile(r"(?:models:/)?(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")
DIRECTORY_TAG, STAGE_TAG, PARENT_TAG = "deepwright.directory", "deepwright.stage", "mlflow.parentRunId"
REUSED_TAG = "deepwright.reused."


@dataclass(frozen=True)
class Source:
    """The model directory that a name means; for a registered name also which model and version it is, and its tags."""

    directory: Path
    name: str = ""
    version: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)


def locate(source: str, plugins: Plugins) -> Path:
    """The model directory that `source` means; `RequestError` when there is none."""
    return find(source, plugins).directory


def find(source: str, plugins: Plugins) -> Source:
    """What `source` means where runs are remembered by default; `RequestError` when it means nothing."""
    if Path(source).expanduser().exists():
        return find_at(source, Path(), "")
    _registered(source)  # what can be no name at all is told without asking where runs are remembered
    from . import request

    asked = request.make(request.PIPELINE, [], plugins)
    return find_at(source, asked.root, asked.tracking.uri)


def find_at(source: str, root: Path, uri: str) -> Source:
    """What `source` means to the tracker at `uri`, or to the one of the runs below `root` when that is empty."""
    path = Path(source).expanduser()
    if path.exists():
        return Source(find_model(path))
    registered = _registered(source)
    from mlflow.exceptions import MlflowException

    from . import mlflow_tracker

    client = mlflow_tracker.client_at(root, uri)
    try:
        version = None if registered is None else _version(client, registered)
        run_id = source if version is None else str(version.run_id)
        directories = _directories(client, run_id)
    except MlflowException as error:
        raise RequestError(
            f"'{source}' is not known to the tracker: {str(error).splitlines()[0].rstrip('.')}."
        ) from None
    for directory in directories:
        try:
            found = find_model(directory)
        except RequestError:
            continue
        return Source(found) if version is None else Source(found, version.name, str(version.version), version.tags)
    raise RequestError(f"The run '{source}' left no model that is still on the disk (looked in its directories).")


def _registered(source: str) -> re.Match[str] | None:
    """The parts of a registered name, None for a run id; `RequestError` for what is neither."""
    registered = REGISTERED.fullmatch(source)
    if RUN_ID.fullmatch(source) is None and registered is None:
        raise RequestError(
            f"'{source}' is no directory, no run id (32 hex digits) and no registered model (such as "
            "deepwright@champion); expected one of them."
        )
    return registered


def _version(client: MlflowClient, registered: re.Match[str]) -> ModelVersion:
    name, alias, version = registered["name"], registered["alias"], registered["version"]
    return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)


def _directories(client: MlflowClient, run_id: str) -> list[Path]:
    """Stage directories of a run, those of the last stages first."""
    run = client.get_run(run_id)
    tags = run.data.tags
    if STAGE_TAG in tags:
        return [Path(tags[DIRECTORY_TAG])]
    made = client.search_runs([run.info.experiment_id], f"tags.`{PARENT_TAG}` = '{run_id}'")
    made += [client.get_run(tags[tag]) for tag in tags if tag.startswith(REUSED_TAG) and RUN_ID.fullmatch(tags[tag])]
    latest = sorted(made, key=lambda each: each.info.start_time, reverse=True)
    return [Path(each.data.tags[DIRECTORY_TAG]) for each in latest if DIRECTORY_TAG in each.data.tags]
