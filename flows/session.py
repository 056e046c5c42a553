"""One run from beginning to end: its directory, its log, its record, its stages in order, its summary.

`carry_out` is the seam for the workflow engine: it is called for each stage and must call `run.execute(step)`.
Without one (tests, a machine without servers) the stages run straight through.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deepwright_core.errors import RequestError, WorkError
from deepwright_core.events import CheckpointEvent, RunEvent
from deepwright_core.hookspecs import hookimpl
from deepwright_core.plugins import Plugins
from deepwright_core.stage import write_atomically

from . import compose, run_tracking, summary
from .request import Request
from .rich_progress import Display, duration
from .run_tracking import StageTracking
from .runner import Outcome, Run, Step, full_disk_sentence, is_full_disk, tell

log = logging.getLogger("deepwright.run")
CarryOut = Callable[[Run, Step], Outcome]


@dataclass
class Report:
    """How a run ended."""

    outcomes: list[Outcome]
    directory: Path
    seconds: float
    markdown: str = ""
    links: dict[str, str] = field(default_factory=dict)


class FlushAtCheckpoints:
    """What was logged before a checkpoint must not be lost after it: the resumed stage will not log it again."""

    def __init__(self) -> None:
        self.tracking: StageTracking | None = None

    def watch(self, tracking: StageTracking | None) -> None:
        self.tracking = tracking

    @hookimpl
    def deepwright_checkpoint_saved(self, event: CheckpointEvent) -> None:
        if self.tracking is not None:
            self.tracking.flush()


def straight(run: Run, step: Step) -> Outcome:
    """Carry a stage out with nothing around it."""
    return run.execute(step)


def run(
    request: Request,
    plugins: Plugins,
    display: Display,
    *,
    carry_out: CarryOut = straight,
    links: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Report:
    """Run the request's stages. Raises `RequestError` or `WorkError`."""
    started = time.monotonic()
    directory = _new_directory(request)
    with _log_file(directory / "log.txt"):
        log.info("target %s, overrides %s", request.target, list(request.overrides))
        for provider in plugins.providers:
            log.info("plugin %s", provider)
        tell(plugins, "deepwright_run_start", RunEvent(request.target, request.composed, request.root), display.say)
        tracking = run_tracking.of(request)
        report = Report([], directory, 0.0, links=dict(links or {}))
        status = "stopped"
        flusher = FlushAtCheckpoints()
        plugins.manager.register(flusher)
        try:
            tracking.start(request, directory, report.links, tags or {})
            if tracking.address():
                report.links["tracking"] = tracking.address()
            the_run = Run(request, plugins, tracking, display, display.say, dict(tags or {}), flusher.watch)
            for stage in request.stages:
                display.stage(stage.name)
                for artifact, path in stage.given.items():
                    display.say(f"{stage.name}: {artifact} is {path}")
                outcome = carry_out(the_run, the_run.prepare(stage))
                report.outcomes.append(outcome)
                display.close()
                display.say(_line(outcome))
            status = "done"
            return report
        except (RequestError, WorkError) as error:
            status = "failed"
            log.error("%s", error)
            raise
        except OSError as error:
            status = "failed"
            log.exception("failed")
            if is_full_disk(error):
                raise WorkError(full_disk_sentence(request.target, request.root)) from error
            raise WorkError(f"{request.target} failed: {error}") from error
        except Exception:
            status = "failed"
            log.exception("failed")
            raise
        finally:
            display.close()
            plugins.manager.unregister(flusher)
            report.seconds = time.monotonic() - started
            report.markdown = summary.markdown(
                report.outcomes, report.seconds, request.run.cpu_watts, request.root, report.links
            )
            event = RunEvent(request.target, request.composed, request.root, status)
            tell(plugins, "deepwright_run_end", event, display.say)
            try:
                write_atomically(directory / "summary.md", f"{request.target}: {status}\n\n{report.markdown}\n")
                tracking.finish(status, report.markdown, report.outcomes)
            except Exception as error:
                log.exception("the record of the run could not be closed")
                display.say(f"The record of the run could not be closed: {error}")


def _line(outcome: Outcome) -> str:
    label = outcome.result.headline[0]
    gain = f"  {label} {summary.cells(outcome)[5]}" if label else ""
    if outcome.reused:
        return f"✓ {outcome.stage:<9} reused {outcome.directory.name}{gain}"
    return f"✓ {outcome.stage:<9} done in {duration(outcome.seconds)}{gain}"


def _new_directory(request: Request) -> Path:
    """`<root>/history/<time>-<target>`, with the resolved config in it."""
    base = f"{time.strftime('%Y%m%d-%H%M%S')}-{request.target}"
    try:
        for attempt in range(100):
            directory = request.root / "history" / (base if attempt == 0 else f"{base}-{attempt + 1}")
            try:
                directory.mkdir(parents=True)
                break
            except FileExistsError:
                continue
        write_atomically(directory / "config.yaml", compose.to_yaml(dict(request.composed)))
    except OSError as error:
        if is_full_disk(error):
            raise WorkError(full_disk_sentence(request.target, request.root)) from error
        raise RequestError(
            f"paths.root is '{request.root}', and nothing can be written there: {error.strerror}."
        ) from error
    return directory


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Everything that is logged in this process while the run lasts, tracebacks included, also goes to a file."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda record: record.process == os.getpid())
    root = logging.getLogger()
    root.addHandler(handler)
    for name in ("deepwright", *(f"deepwright_{p}" for p in ("core", "kernels", "moe", "mla", "rl", "serve"))):
        logging.getLogger(name).setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
