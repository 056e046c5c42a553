"""`deepwright up`: the workflow's pages, the tracker's pages, and a worker with every flow deployed, until Ctrl-C.

All three are child processes on the loopback address. When one of them ends by itself, the others are ended too and the
last line of its log is shown. Runs started elsewhere with the same root find these servers (see `service_addresses`).
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import click

from deepwright_core.errors import RequestError, WorkError

PREFECT_PORT = 4200
MLFLOW_PORT = 5000
START_SECONDS = 120.0


@click.command(
    short_help="Start the workflow's and the tracker's pages, and a worker.",
    epilog="""\b
Examples:
  deepwright up
  deepwright up --root /data/runs --prefect-port 4300 --mlflow-port 5300""",
)
@click.option("--root", default="runs", show_default=True, help="Where runs write; the same as paths.root.")
@click.option("--prefect-port", type=click.IntRange(1, 65535), help=f"Default: {PREFECT_PORT}, or the next free one.")
@click.option("--mlflow-port", type=click.IntRange(1, 65535), help=f"Default: {MLFLOW_PORT}, or the next free one.")
def up(root: str, prefect_port: int | None, mlflow_port: int | None) -> None:
    """Start the Prefect server, the MLflow server and a worker on this machine, and print where they are.

    Ctrl-C stops all of them.
    """
    from .cli_plugins import load_plugins

    load_plugins()
    place = Path(root).expanduser().resolve()
    ports = choose_ports(prefect_port, mlflow_port)
    with _stop_on_sigterm():
        Services(place, *ports).run()


def choose_ports(prefect: int | None, mlflow: int | None) -> tuple[int, int]:
    """The ports to use. One that was asked for must be free; a default one gives way to the next free one."""
    problems = []
    for what, port in (("--prefect-port", prefect), ("--mlflow-port", mlflow)):
        if port is not None and not _free(port):
            problems.append(f"{what} {port}: the port is in use on 127.0.0.1; choose another or stop what uses it.")
    if prefect is not None and prefect == mlflow:
        problems.append(f"--prefect-port and --mlflow-port are both {prefect}; they must differ.")
    if problems:
        raise RequestError(problems)
    first = prefect or _next_free(PREFECT_PORT, avoid=mlflow)
    return first, mlflow or _next_free(MLFLOW_PORT, avoid=first)


def _free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _next_free(first: int, avoid: int | None) -> int:
    for port in range(first, min(first + 200, 65536)):
        if port != avoid and _free(port):
            return port
    raise RequestError(f"No port between {first} and {first + 199} is free on 127.0.0.1; name one that is.")


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM stops like Ctrl-C."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Child:
    name: str
    process: Popen[Any]
    log: Path


class Services:
    """The three children."""

    def __init__(self, root: Path, prefect_port: int, mlflow_port: int) -> None:
        self.root = root
        self.prefect = f"http://127.0.0.1:{prefect_port}"
        self.mlflow = f"http://127.0.0.1:{mlflow_port}"
        self._ports = (prefect_port, mlflow_port)
        self._children: list[_Child] = []
        self._redeploy = False

    def run(self) -> None:
        """Start everything, wait, stop everything."""
        from . import environment, lifeline, service_addresses

        already = service_addresses.running(self.root)
        if already is not None:
            raise RequestError(
                f"`deepwright up` is running already for {self.root}: {already.prefect} and {already.mlflow}."
            )
        self.root.mkdir(parents=True, exist_ok=True)
        environment.apply(self.root)
        signal.signal(signal.SIGHUP, self._ask_for_redeploy)
        try:
            click.echo(f"Starting below {self.root} ...", err=True)
            self._start_servers()
            service_addresses.write(self.root, self.prefect, self.mlflow)
            self._start_worker()
            click.echo(self._addresses())
            self._watch()
        except KeyboardInterrupt:
            click.echo("Stopping ...", err=True)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave a child behind
            service_addresses.remove(self.root)
            for child in reversed(self._children):
                lifeline.end(child.process)
        click.echo("Stopped.", err=True)

    def _ask_for_redeploy(self, *_: Any) -> None:
        self._redeploy = True

    def _addresses(self) -> str:
        return (
            f"Workflow (start and watch runs):  {self.prefect}/v2/deployments\n"
            f"Tracker (metrics and models):     {self._tracker_page()}\n"
            f"Runs write to {self.root}. Ctrl-C stops everything."
        )

    def _tracker_page(self) -> str:
        """The page of the newest experiment that runs wrote to. MLflow's front page speaks of other things; the view of
        training runs has to be asked for."""
        import httpx

        query = {"max_results": 2, "order_by": ["last_update_time DESC"]}
        try:
            found = httpx.post(f"{self.mlflow}/api/2.0/mlflow/experiments/search", json=query, timeout=10).json()
            ids = [e["experiment_id"] for e in found.get("experiments", []) if e["experiment_id"] != "0"]
        except (httpx.HTTPError, ValueError):
            ids = []
        place = f"experiments/{ids[0]}/runs" if ids else "experiments"
        return f"{self.mlflow}/#/{place}?workflowType=machine_learning"

    def _start(self, name: str, arguments: list[str], environment: dict[str, str]) -> _Child:
        from . import lifeline

        log = self.root / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = lifeline.start(["-m", "flows.lifeline", *arguments], environment, stdout=output, stderr=output)
        child = _Child(name, process, log)
        self._children.append(child)
        return child

    def _start_servers(self) -> None:
        from .mlflow_tracker import database_uri
        from .prefect_server import wait_until_healthy

        prefect_port, mlflow_port = map(str, self._ports)
        (self.root / "mlflow" / "artifacts").mkdir(parents=True, exist_ok=True)
        workflow = self._start(
            "prefect-server",
            ["prefect", "server", "start", "--host", "127.0.0.1", "--port", prefect_port],
            {"PREFECT_SERVER_UI_API_URL": f"{self.prefect}/api", "PREFECT_API_URL": f"{self.prefect}/api"},
        )
        tracker = self._start(
            "mlflow-server",
            [
                *("mlflow", "server", "--host", "127.0.0.1", "--port", mlflow_port, "--workers", "1"),
                *("--backend-store-uri", database_uri(self.root)),
                *("--artifacts-destination", (self.root / "mlflow" / "artifacts").as_uri()),
            ],
            {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        wait_until_healthy(f"{self.prefect}/api/health", workflow.process, START_SECONDS, workflow.log)
        wait_until_healthy(f"{self.mlflow}/health", tracker.process, START_SECONDS, tracker.log)

    def _start_worker(self) -> None:
        ready = self.root / "prefect" / "worker-ready"
        ready.unlink(missing_ok=True)
        worker = self._start(
            "worker",
            ["flows.deploy", str(ready)],
            {
                "PREFECT_API_URL": f"{self.prefect}/api",
                "DEEPWRIGHT_ROOT": str(self.root),
                "PREFECT_RUNNER_POLL_FREQUENCY": "2",
            },
        )
        deadline = time.monotonic() + START_SECONDS
        while not ready.is_file():
            self._check()
            if time.monotonic() > deadline:
                raise WorkError(f"The worker was not ready after {START_SECONDS:.0f} s; see {worker.log}.")
            time.sleep(0.1)

    def _watch(self) -> None:
        from . import lifeline

        while True:
            time.sleep(0.5)
            if self._redeploy:
                self._redeploy = False
                worker = self._children.pop()
                lifeline.end(worker.process)
                self._start_worker()
                click.echo("The worker has started again with the flows as they are now.", err=True)
            self._check()

    def _check(self) -> None:
        for child in self._children:
            if child.process.poll() is not None:
                lines = child.log.read_text(errors="replace").strip().splitlines()
                raise WorkError(
                    f"The {child.name} ended with status {child.process.returncode}. "
                    f"The last line of {child.log}: {lines[-1] if lines else '(empty)'}"
                )
