"""Runs remembered by MLflow: one parent run for a run, a child for each stage that did work in it.

Without a server it writes to a database and a folder below `paths.root`. Points are written in batches, a few times a
minute; a resumed stage goes on in its own run and repeats no point. A stage that was reused makes no run: the parent
points to the one that made it. A tracker that fails is reported once and never stops the work.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from deepwright_core.errors import WorkError
from deepwright_core.stage import write_atomically

from . import environment, fingerprint, service_addresses
from .request import PIPELINE, Request

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

    from .runner import Outcome

log = logging.getLogger("deepwright.tracking")

LOCAL = "sqlite:///"
FLUSH_SECONDS = 5.0
FLUSH_POINTS = 2000
_BATCH = 900  # MLflow takes at most 1000 points, 100 parameters and 100 tags in one call
REFERENCE_FILE = "tracking.json"
PROCESS_TAG = "deepwright.process"
PARENT_TAG = "mlflow.parentRunId"
NOTE_TAG = "mlflow.note.content"


def database_uri(root: Path) -> str:
    """The database of the runs below `root`."""
    return f"{LOCAL}{root / 'mlflow' / 'mlflow.db'}"


def client_for(request: Request) -> MlflowClient:
    """A client of what a request is remembered by."""
    return client_at(request.root, request.tracking.uri)


def client_at(root: Path, uri: str) -> MlflowClient:
    """A client of the server at `uri`, or of the database below the root."""
    environment.apply(root)
    (root / "mlflow").mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    uri = uri or database_uri(root)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def experiment_in(client: MlflowClient, name: str) -> str:
    """The id of an experiment, made if it is new: in a local database with its files beside that, where MLflow's own
    default is whatever directory is the current one."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    uri = client.tracking_uri
    database = Path(uri.removeprefix(LOCAL)).resolve() if uri.startswith(LOCAL) else None
    folder = None if database is None else (database.parent / "artifacts").as_uri()
    try:
        return str(client.create_experiment(name, artifact_location=folder))
    except Exception:  # another run was quicker
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def this_process() -> str:
    """This process as nobody else can be called, ever."""
    return f"{socket.gethostname()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def _lives(process: str) -> bool:
    host, pid, created = process.rsplit(":", 2)
    if host != socket.gethostname():
        return True  # cannot be known from here
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(created)) < 0.05
    except (psutil.Error, ValueError):
        return False


def sweep(client: MlflowClient, experiment_id: str) -> None:
    """Runs whose process was killed still say RUNNING; say KILLED."""
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        process = run.data.tags.get(PROCESS_TAG)
        if process is not None and not _lives(process):
            client.set_terminated(run.info.run_id, "KILLED")


def flat(values: Any, path: str = "") -> dict[str, str]:
    """Nested values as dotted names, for MLflow's table of parameters."""
    if isinstance(values, Mapping) and values:
        found: dict[str, str] = {}
        for key, item in values.items():
            found.update(flat(item, f"{path}.{key}" if path else str(key)))
        return found
    return {path: str(values)[:500]}


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """A record that cannot be written is reported and does not stop the work."""
    try:
        yield
    except Exception as error:
        log.warning("MLflow could not %s: %s", what, str(error).splitlines()[0] if str(error) else type(error).__name__)
        log.debug("tracking failed", exc_info=True)


class MlflowTracking:
    """The parent run."""

    def __init__(self) -> None:
        self._run_id = ""

    def start(self, request: Request, directory: Path, links: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._request = request
        try:
            self._client = client_for(request)
            self._experiment_id = experiment_in(self._client, request.tracking.experiment)
            sweep(self._client, self._experiment_id)
            note = "\n\n".join(f"[{what}]({where})" for what, where in links.items() if where.startswith("http"))
            run = self._client.create_run(
                self._experiment_id,
                run_name=directory.name,
                tags={
                    PROCESS_TAG: this_process(),
                    "deepwright.target": request.target,
                    "deepwright.overrides": " ".join(request.overrides)[:4000],
                    "deepwright.directory": str(directory),
                    "mlflow.source.name": f"deepwright run {request.target}",
                    **({NOTE_TAG: note} if note else {}),
                    **tags,
                },
            )
        except Exception as error:
            where = request.tracking.uri or database_uri(request.root)
            raise WorkError(
                f"MLflow cannot be used at {where}: {str(error).splitlines()[0]}. "
                f"Look at tracking.uri, or run with tracking=jsonl."
            ) from error
        self._run_id = run.info.run_id
        with _harmless("keep the configuration"):
            _log_parameters(self._client, run, flat(dict(request.composed)))
            self._client.log_artifact(self._run_id, str(directory / "config.yaml"))
            self._client.log_text(self._run_id, json.dumps(surroundings(), indent=1), "environment.json")

    def stage(
        self, name: str, identity: str, directory: Path, made_from: Mapping[str, Any], tags: Mapping[str, str]
    ) -> MlflowStage:
        tags = {
            PARENT_TAG: self._run_id,
            PROCESS_TAG: this_process(),
            "deepwright.stage": name,
            "deepwright.identity": identity,
            "deepwright.directory": str(directory),
            **tags,
        }
        run = self._run_of(directory, identity)
        if run is None:
            run = self._client.create_run(self._experiment_id, run_name=name, tags=tags)
            write_atomically(directory / REFERENCE_FILE, json.dumps(self._reference(run)))
        else:
            self._client.update_run(run.info.run_id, status="RUNNING")
            for key, value in tags.items():
                self._client.set_tag(run.info.run_id, key, value)
        tracking = MlflowStage(self._client, run, self._request)
        tracking.parameters(flat(made_from.get("sections", {})))
        tracking.parameters(flat({"given": made_from.get("given", {})}))
        return tracking

    def _reference(self, run: MlflowRun) -> dict[str, str]:
        uri = self._request.tracking.uri or database_uri(self._request.root)
        return {"uri": uri, "run_id": run.info.run_id, "experiment_id": run.info.experiment_id}

    def _run_of(self, directory: Path, identity: str) -> MlflowRun | None:
        """The run in which an earlier attempt at this stage was recorded, if it is still there."""
        try:
            reference = json.loads((directory / REFERENCE_FILE).read_text())
            run = self._client.get_run(reference["run_id"])
        except Exception:
            return None
        same = run.data.tags.get("deepwright.identity") == identity and run.info.lifecycle_stage == "active"
        return run if same else None

    def reused(self, name: str, identity: str, directory: Path, record: Mapping[str, Any]) -> str:
        reference = record.get("tracking") or {}
        with _harmless("point to the run of a reused stage"):
            self._client.set_tag(self._run_id, f"deepwright.reused.{name}", reference.get("run_id", str(directory)))
        return _page(self._request, reference.get("experiment_id", ""), reference.get("run_id", ""))

    def finish(self, status: str, summary: str, outcomes: Sequence[Outcome]) -> None:
        if not self._run_id:
            return
        with _harmless("close the run"):
            if status == "done" and self._request.target == PIPELINE:
                from . import registered_model

                registered_model.register(self._client, self._request, outcomes, self._run_id)
        with _harmless("close the run"):
            finals = {f"{o.stage}/{key}": float(value) for o in outcomes for key, value in o.result.metrics.items()}
            _log_points(self._client, self._run_id, [(key, value, _now(), 0) for key, value in finals.items()])
            note = self._client.get_run(self._run_id).data.tags.get(NOTE_TAG, "")
            self._client.set_tag(self._run_id, NOTE_TAG, f"{note}\n\n{summary}".strip()[:7900])
            self._client.log_text(self._run_id, summary, "summary.md")
            mlflow_status = {"done": "FINISHED", "failed": "FAILED"}.get(status, "KILLED")
            self._client.set_terminated(self._run_id, mlflow_status)

    def address(self) -> str:
        if not self._run_id:
            return ""
        page = _page(self._request, self._experiment_id, self._run_id)
        return page or f"MLflow run {self._run_id} (`deepwright up` shows it)"


class MlflowStage:
    """A stage's run."""

    def __init__(self, client: MlflowClient, run: MlflowRun, request: Request) -> None:
        self._client = client
        self._run = run
        self._id: str = run.info.run_id
        self._request = request
        # What an earlier attempt logged; MLflow itself would keep both points of a repeated step.
        self._last = {
            key: max(point.step for point in client.get_metric_history(self._id, key)) for key in run.data.metrics
        }
        self._waiting: list[tuple[str, float, int, int]] = []
        self._flushed = time.monotonic()
        self._failed = False
        self._process = psutil.Process()
        self._process.cpu_percent()

    @classmethod
    def attach(cls, request: Request, reference: Mapping[str, str], directory: Path) -> MlflowStage:
        """In another process than the run's."""
        client = client_for(request)
        return cls(client, client.get_run(reference["run_id"]), request)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = _now()
        for key, value in values.items():
            if step > self._last.get(key, -1):
                self._last[key] = step
                number = float(value)
                self._waiting.append((key, number if math.isfinite(number) else math.nan, now, step))
        if len(self._waiting) >= FLUSH_POINTS or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self._sample(step)
            self.flush()

    def _sample(self, step: int) -> None:
        used = {
            "system/memory_mib": self._process.memory_info().rss / 2**20,
            "system/cpu_percent": self._process.cpu_percent(),
        }
        for key, value in used.items():
            if step > self._last.get(key, -1):
                self._last[key] = step
                self._waiting.append((key, value, _now(), step))

    def flush(self) -> None:
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        try:
            _log_points(self._client, self._id, self._waiting)
            self._waiting = []
        except Exception as error:
            self._waiting = self._waiting[-20 * FLUSH_POINTS :]  # try again with the next ones
            if not self._failed:
                log.warning("MLflow could not keep metrics: %s", str(error).splitlines()[0])
                log.debug("tracking failed", exc_info=True)
            self._failed = True

    def parameters(self, values: Mapping[str, Any]) -> None:
        with _harmless("keep parameters"):
            self._run = self._client.get_run(self._id)
            _log_parameters(self._client, self._run, {key: str(value)[:500] for key, value in values.items()})

    def artifact(self, path: Path, folder: str = "") -> None:
        if not path.exists():
            raise FileNotFoundError(f"artifact {path} does not exist")
        with _harmless(f"keep {path}"):
            size = sum(f.stat().st_size for f in fingerprint.files_of(path))
            if size > self._request.tracking.artifact_limit_mb * 1e6:
                pointer = {"path": str(path), "bytes": size}
                target = "/".join(part for part in (folder, f"{path.name}.location.json") if part)
                self._client.log_text(self._id, json.dumps(pointer, indent=1), target)
            elif path.is_dir():
                self._client.log_artifacts(self._id, str(path), "/".join(p for p in (folder, path.name) if p))
            else:
                self._client.log_artifact(self._id, str(path), folder or None)

    def reference(self) -> dict[str, str]:
        uri = self._request.tracking.uri or database_uri(self._request.root)
        return {"uri": uri, "run_id": self._id, "experiment_id": self._run.info.experiment_id}

    def address(self) -> str:
        return _page(self._request, self._run.info.experiment_id, self._id)

    def finish(self, record: Mapping[str, Any], directory: Path) -> None:
        self.flush()
        for relative in record["outputs"].values():
            self.artifact(directory / relative, "outputs")
        with _harmless("close the run of a stage"):
            finals = [(f"final/{key}", float(value), _now(), 0) for key, value in record["metrics"].items()]
            finals += [("final/seconds", record["seconds"], _now(), 0), ("final/joules", record["joules"], _now(), 0)]
            _log_points(self._client, self._id, [p for p in finals if p[0] not in self._last])
            self._client.log_text(self._id, json.dumps(dict(record), indent=1), "result.json")
            self._plots()
            label, before, after = record["headline"]
            if label:
                self._client.set_tag(self._id, NOTE_TAG, f"{label}: {before} → {after}\n\n`{directory}`")
            self._client.set_terminated(self._id, "FINISHED")

    def _plots(self) -> None:
        from . import metric_plots

        histories = {}
        for key in self._client.get_run(self._id).data.metrics:
            if not key.startswith("final/"):
                points = sorted((p.step, p.value) for p in self._client.get_metric_history(self._id, key))
                histories[key] = points
        with tempfile.TemporaryDirectory() as folder:
            for path in metric_plots.draw(histories, Path(folder)):
                self._client.log_artifact(self._id, str(path), "plots")

    def fail(self, status: str = "FAILED") -> None:
        self.flush()
        with _harmless("close the run of a stage"):
            self._client.set_terminated(self._id, status)


def _now() -> int:
    return int(time.time() * 1000)


def _log_points(client: MlflowClient, run_id: str, points: Sequence[tuple[str, float, int, int]]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(key, value, timestamp, step) for key, value, timestamp, step in points]
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + _BATCH])


def _log_parameters(client: MlflowClient, run: MlflowRun, values: Mapping[str, str]) -> None:
    """MLflow refuses to change a parameter; what a later attempt has differently becomes a tag."""
    from mlflow.entities import Param, RunTag

    known = run.data.params
    new = [Param(key, value) for key, value in values.items() if key and key not in known]
    changed = [
        RunTag(f"deepwright.now.{key}", value) for key, value in values.items() if key in known and known[key] != value
    ]
    for start in range(0, len(new), 100):
        client.log_batch(run.info.run_id, params=new[start : start + 100])
    if changed:
        client.log_batch(run.info.run_id, tags=changed[:100])


def _page(request: Request, experiment_id: str, run_id: str) -> str:
    """The address of a run's page, when there is a server that shows it."""
    if not run_id:
        return ""
    server = request.tracking.uri if request.tracking.uri.startswith("http") else ""
    if not server:
        running = service_addresses.running(request.root)
        server = running.mlflow if running else ""
    return f"{server}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning" if server else ""


def surroundings() -> dict[str, Any]:
    """What a run ran on and with."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "commit": _commit(),
        "packages": sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions() if d.metadata["Name"]}),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str:
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists() or shutil.which("git") is None:
        return ""
    asked = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip()
