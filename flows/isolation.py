"""A stage in a process of its own (`run.isolate=true`): a crash there is a failed stage with the log's last lines.

The child leads its own process group, which is killed as a whole when the run stops. It reports progress as JSON lines
over a pipe; its output goes to `output.log` in the stage's directory.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepwright_core import kernel_backends
from deepwright_core.errors import RequestError, WorkError
from deepwright_core.plugins import installed
from deepwright_core.stage import StageContext, StageResult, write_atomically
from deepwright_core.tracking import Progress

from . import compose, lifeline, run_tracking, threads

if TYPE_CHECKING:
    from .request import Request
    from .run_tracking import StageTracking
    from .runner import Step

JOB_FILE = "isolated_job.json"
ANSWER_FILE = "isolated_answer.json"
OUTPUT_FILE = "output.log"
TAIL_LINES = 12


def run(request: Request, step: Step, tracking: StageTracking, progress: Progress) -> StageResult:
    """Run a stage in a child process and wait for it."""
    directory = step.directory.path
    (directory / ANSWER_FILE).unlink(missing_ok=True)
    config = directory / "isolated_config.yaml"
    write_atomically(config, compose.to_yaml(dict(request.composed)))
    tracking.flush()
    reader, writer = os.pipe()
    job = {
        "stage": step.name,
        "config": str(config),
        "directory": str(directory),
        "inputs": {name: str(path) for name, path in step.inputs.items()},
        "reference": tracking.reference(),
        "progress": writer,
    }
    write_atomically(directory / JOB_FILE, json.dumps(job))
    with (directory / OUTPUT_FILE).open("ab") as output:
        child = lifeline.start(
            ["-m", "flows.isolation", str(directory / JOB_FILE)], stdout=output, stderr=output, pass_fds=(writer,)
        )
    os.close(writer)
    try:
        with os.fdopen(reader) as lines:
            for line in lines:
                kind, *values = json.loads(line)
                (progress.start if kind == "start" else progress.advance)(*values)
        status = child.wait()
    finally:
        lifeline.end(child)
    answer = directory / ANSWER_FILE
    if answer.is_file():
        return _result(json.loads(answer.read_text()))
    lines_left = (directory / OUTPUT_FILE).read_text(errors="replace").splitlines()[-TAIL_LINES:]
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    raise WorkError(
        f"{step.name} {how} in its own process. The last lines of {directory / OUTPUT_FILE}:\n" + "\n".join(lines_left)
    )


def _result(answer: Mapping[str, Any]) -> StageResult:
    if answer["kind"] == "request":
        raise RequestError(answer["problems"])
    if answer["kind"] == "work":
        raise WorkError(answer["message"])
    return StageResult.from_record(answer)


class _PipeProgress:
    """Progress as JSON lines."""

    def __init__(self, descriptor: int) -> None:
        self._pipe = os.fdopen(descriptor, "w", buffering=1)

    def start(self, description: str, total: int, completed: int = 0) -> None:
        self._pipe.write(json.dumps(["start", description, total, completed]) + "\n")

    def advance(self, completed: int, note: str = "") -> None:
        self._pipe.write(json.dumps(["advance", completed, note]) + "\n")


def child(job_file: Path) -> int:
    """What the child process does."""
    from . import request as requests
    from .runner import full_disk_sentence, is_full_disk
    from .session import FlushAtCheckpoints

    job = json.loads(job_file.read_text())
    directory = Path(job["directory"])
    answer: dict[str, Any]
    plugins = installed()
    try:
        request = requests.make(job["stage"], [], plugins, config_file=job["config"])
        stage = next(s for s in request.stages if s.name == job["stage"])
        tracking = run_tracking.attach(request, job["reference"], directory)
        flusher = FlushAtCheckpoints()
        flusher.watch(tracking)
        plugins.manager.register(flusher)
        context = StageContext(
            directory=directory,
            tracker=tracking,
            progress=_PipeProgress(job["progress"]),
            registry=plugins.registry,
            hook=plugins.hook,
            inputs={name: Path(path) for name, path in job["inputs"].items()},
        )
        threads.use(request.sections.get("threads", 0))
        with kernel_backends.use(request.sections["kernels"]):
            result = stage.run({name: request.sections[name] for name in stage.sections}, context)
        tracking.flush()
        answer = {"kind": "done", **result.as_record()}
    except RequestError as error:
        answer = {"kind": "request", "problems": error.problems}
    except WorkError as error:
        answer = {"kind": "work", "message": str(error)}
    except Exception as error:
        import traceback

        traceback.print_exc()
        if not is_full_disk(error):
            return 1
        answer = {"kind": "work", "message": full_disk_sentence(job["stage"], directory)}
    write_atomically(directory / ANSWER_FILE, json.dumps(answer))
    return 0


if __name__ == "__main__":
    lifeline.hold()
    sys.exit(child(Path(sys.argv[1])))
