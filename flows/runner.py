"""Runs stages: skips what is done, enters again what was cut off, hands each stage the outputs it needs.

Nothing here knows Prefect or MLflow. `prepare` decides (cheaply) what a stage's identity is and whether it is done;
`execute` does it. A flow calls the two with a task in between, a test calls them one after the other.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepwright_core import kernel_backends
from deepwright_core.errors import RequestError, WorkError
from deepwright_core.events import StageEvent
from deepwright_core.plugins import Plugins
from deepwright_core.stage import Stage, StageContext, StageResult, identity
from deepwright_core.tracking import Progress

from . import energy, fingerprint, given_digests, isolation, threads
from .request import Request
from .run_tracking import RunTracking, StageTracking
from .stage_directory import Finished, StageDirectory

log = logging.getLogger("deepwright.run")


@dataclass(frozen=True)
class Step:
    """A stage with everything decided that decides its result."""

    stage: Stage
    directory: StageDirectory
    inputs: Mapping[str, Path]
    made_from: Mapping[str, Any]
    done: Finished | None
    force: bool

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def identity(self) -> str:
        return self.directory.identity


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    stage: str
    identity: str
    directory: Path
    finished: Finished
    reused: bool
    seconds: float
    joules: float
    measured: bool
    inputs: Mapping[str, Path]
    tracked_at: str = ""

    @property
    def result(self) -> StageResult:
        return self.finished.result


@dataclass
class Run:
    """One run of a request: its surroundings, and the outcomes so far."""

    request: Request
    plugins: Plugins
    tracking: RunTracking
    progress: Progress
    say: Callable[[str], None] = log.info
    tags: dict[str, str] = field(default_factory=dict)
    on_tracking: Callable[[StageTracking | None], None] = lambda tracking: None
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def prepare(self, stage: Stage) -> Step:
        """Work out a stage's identity; the stages it needs must have outcomes."""
        inputs: dict[str, Path] = {}
        digests: dict[str, str] = {}
        for artifact, maker in stage.needs.items():
            outcome = self.outcomes[maker]
            if artifact not in outcome.result.outputs:
                raise WorkError(
                    f"Stage {stage.name} needs '{artifact}' from {maker}, which made only "
                    f"{', '.join(outcome.result.outputs) or 'nothing'}."
                )
            inputs[artifact] = outcome.directory / outcome.result.outputs[artifact]
            digests[artifact] = outcome.finished.digests[artifact]
        given: dict[str, dict[str, str]] = {}
        for artifact, path in stage.given.items():
            inputs[artifact] = path
            digests[artifact] = given_digests.digest_of(path, self.request.root)
            given[artifact] = {"directory": str(path), "sha256": digests[artifact]}
        sections = {name: fingerprint.plain(self.request.sections[name]) for name in stage.sections}
        registry = self.plugins.registry
        code = fingerprint.code_versions(registry.get("stage", stage.name), sections, registry)
        directory = StageDirectory.of(self.request.root, stage.name, identity(sections, digests, code))
        force = stage.name in self.request.run.force
        done, why = directory.finished()
        if why:
            self.say(f"{stage.name}: the earlier result cannot be used, because {why}; doing it again.")
        made_from = {"sections": sections, "inputs": digests, "code": code, "given": given}
        return Step(stage, directory, inputs, made_from, None if force else done, force)

    def execute(self, step: Step) -> Outcome:
        """Reuse the stage's result or make it. Raises `RequestError` or `WorkError`."""
        if step.done is None:
            with step.directory.locked(self.say):
                done, _ = step.directory.finished()  # another run may have made it while we waited
                outcome = self._make(step) if done is None or step.force else self._reuse(step, done)
        else:
            outcome = self._reuse(step, step.done)
        self.outcomes[step.name] = outcome
        return outcome

    def _reuse(self, step: Step, done: Finished) -> Outcome:
        event = StageEvent(step.name, step.identity, step.directory.path, "reused", dict(done.result.metrics))
        self._tell("deepwright_stage_end", event)
        tracked_at = self.tracking.reused(step.name, step.identity, step.directory.path, done.record)
        return Outcome(
            step.name, step.identity, step.directory.path, done, True, done.seconds, 0.0, False, step.inputs, tracked_at
        )

    def _make(self, step: Step) -> Outcome:
        self._require_space(step)
        if step.force:
            step.directory.clear()
        step.directory.enter(step.made_from)
        self._tell("deepwright_stage_start", StageEvent(step.name, step.identity, step.directory.path))
        tracking = self.tracking.stage(step.name, step.identity, step.directory.path, step.made_from, self.tags)
        self.on_tracking(tracking)
        meter = energy.Meter(self.request.run.cpu_watts)
        started = time.monotonic()
        status, metrics = "stopped", dict[str, float]()
        try:
            with self._explained(step):
                result = self._run(step, tracking)
                seconds = time.monotonic() - started
                used = meter.read(seconds)
                facts = {
                    "joules": used.joules,
                    "joules_measured": used.measured,
                    "tracking": tracking.reference(),
                    "given": step.made_from["given"],
                }
                record = step.directory.describe(result, seconds, facts)
                # The tracker first: a stage that is cut off in between is entered again and tells it again.
                tracking.finish(record, step.directory.path)
                finished = step.directory.finish(record)
            status, metrics = "done", dict(result.metrics)
            return Outcome(
                step.name,
                step.identity,
                step.directory.path,
                finished,
                False,
                seconds,
                used.joules,
                used.measured,
                step.inputs,
                tracking.address(),
            )
        except (RequestError, WorkError):
            status = "failed"
            raise
        finally:
            self.on_tracking(None)
            if status != "done":
                tracking.fail("FAILED" if status == "failed" else "KILLED")
            event = StageEvent(step.name, step.identity, step.directory.path, status, metrics)
            self._tell("deepwright_stage_end", event)

    def _run(self, step: Step, tracking: StageTracking) -> StageResult:
        if self.request.run.isolate:
            return isolation.run(self.request, step, tracking, self.progress)
        context = StageContext(
            directory=step.directory.path,
            tracker=tracking,
            progress=self.progress,
            registry=self.plugins.registry,
            hook=self.plugins.hook,
            inputs=step.inputs,
        )
        sections = {name: self.request.sections[name] for name in step.stage.sections}
        threads.use(self.request.sections.get("threads", 0))
        with kernel_backends.use(self.request.sections["kernels"]):
            return step.stage.run(sections, context)

    @contextmanager
    def _explained(self, step: Step) -> Iterator[None]:
        """Every failure of a stage as a sentence; the traceback goes to the log."""
        try:
            yield
        except (RequestError, WorkError):
            log.debug("%s failed", step.name, exc_info=True)
            raise
        except Exception as error:
            log.debug("%s failed\n%s", step.name, traceback.format_exc())
            if is_full_disk(error):
                raise WorkError(full_disk_sentence(step.name, self.request.root)) from error
            raise WorkError(f"{step.name} failed: {type(error).__name__}: {error}") from error

    def _require_space(self, step: Step) -> None:
        free = shutil.disk_usage(step.directory.path).free / 2**30
        needed = self.request.run.min_free_disk_gb
        if free < needed:
            raise WorkError(
                f"{step.name} was not started: {self.request.root} has {free:.1f} GiB of free disk space and "
                f"run.min_free_disk_gb asks for {needed:g}. Free some space, or lower run.min_free_disk_gb."
            )

    def _tell(self, hook: str, event: StageEvent) -> None:
        tell(self.plugins, hook, event, self.say)


def tell(plugins: Plugins, hook: str, event: Any, say: Callable[[str], None]) -> None:
    """Call an event hook; a plugin's callback that fails is named, and the work goes on."""
    for implementation in reversed(getattr(plugins.hook, hook).get_hookimpls()):
        try:
            implementation.function(event)
        except Exception as error:
            say(f"Plugin {implementation.plugin_name} failed in {hook}: {type(error).__name__}: {error}")
            log.debug("callback failed", exc_info=True)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk or quota (some libraries say it only in words)."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "database or disk is full" in str(error):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def full_disk_sentence(stage: str, root: Path) -> str:
    return (
        f"{stage} stopped because the disk that holds {root} is full. Its last complete checkpoint is kept: "
        f"free some space and type the same command again to go on."
    )
