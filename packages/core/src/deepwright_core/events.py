"""What a callback is told: one immutable record for each moment of a run.

A hook takes one record and nothing else, so a new field never breaks an old plugin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunEvent:
    """A whole run (one or more stages) starts or ends. `status` is "running", "done" or "failed"."""

    target: str
    config: Mapping[str, Any]
    root: Path
    status: str = "running"


@dataclass(frozen=True)
class StageEvent:
    """A stage starts or ends. `status` is "running", "done", "reused" or "failed"."""

    stage: str
    identity: str
    directory: Path
    status: str = "running"
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step is over. `metrics` are plain numbers, already on the host."""

    stage: str
    step: int
    total_steps: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class CheckpointEvent:
    """A checkpoint lies complete on the disk."""

    stage: str
    step: int
    directory: Path


@dataclass(frozen=True)
class RolloutEvent:
    """A batch of samples was generated and scored (one record a sample)."""

    stage: str
    step: int
    samples: list[Mapping[str, Any]]


@dataclass(frozen=True)
class RequestEvent:
    """A server is done with a request to a model: answered, broken off, or its client went away.

    started: seconds since 1970; all other times are seconds from then on. queue_seconds, first_token_seconds: None when
    it never came so far. request is what was asked and answers what was said ("content", "reasoning"): other people's
    text, which is not for logs.
    """

    request_id: str
    path: str
    model: str
    tenant: str
    status: int
    error: str
    started: float
    seconds: float
    queue_seconds: float | None
    first_token_seconds: float | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    finish_reasons: tuple[str, ...]
    request: Mapping[str, Any] = field(default_factory=dict, repr=False)
    answers: tuple[Mapping[str, str], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class EvaluationEvent:
    """An evaluation is over."""

    stage: str
    step: int
    name: str
    metrics: Mapping[str, float]
