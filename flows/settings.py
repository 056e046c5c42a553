"""The config sections that belong to the workflow itself: where a run writes, how it is tracked, how it is run.

They never change a stage's result, so they are no part of its identity.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deepwright_core.errors import RequestError
from deepwright_core.registry import Registry, parse


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PathsConfig(_Section):
    """Where a run writes."""

    root: str = Field(min_length=1)


class TrackingConfig(_Section):
    """How a run is remembered."""

    name: Literal["mlflow", "jsonl", "none"] = "mlflow"
    experiment: str = Field("deepwright", min_length=1)
    uri: str = ""
    registered_model: str = Field("deepwright", min_length=1)
    artifact_limit_mb: float = Field(4096, gt=0)


class RunConfig(_Section):
    """How the stages are run."""

    stages: list[str] = Field(min_length=1)
    force: list[str] = []
    workflow: Literal["prefect", "none"] = "prefect"
    isolate: bool = False
    min_free_disk_gb: float = Field(1.0, ge=0)
    cpu_watts: float = Field(65.0, gt=0)


SECTIONS: dict[str, type[BaseModel]] = {"paths": PathsConfig, "tracking": TrackingConfig, "run": RunConfig}


def parse_sections(composed: dict[str, Any], registry: Registry) -> tuple[dict[str, Any], list[str]]:
    """The workflow's sections, parsed, and a sentence for each problem in them."""
    parsed: dict[str, Any] = {}
    problems: list[str] = []
    for name, model in SECTIONS.items():
        try:
            parsed[name] = parse(model, composed.get(name) or {}, name, registry)
        except RequestError as error:
            problems += error.problems
    return parsed, problems
