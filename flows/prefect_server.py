"""A Prefect server for a run: the one that is named, the one that `deepwright up` runs, or one for this run alone.

Prefect starts a temporary server by itself when it knows of none; ours differs in three ways that people feel: it is
started before Prefect is imported, so that the two overlap; it does not get the terminal's Ctrl-C, so that the run can
still report that it was stopped; and it ends with us even if we are killed. It has no pages and no background services.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import Popen
from typing import Any

from deepwright_core.errors import WorkError

from . import environment, lifeline, service_addresses

START_SECONDS = float(os.environ.get("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "90"))


@contextmanager
def reachable(root: Path) -> Iterator[str]:
    """Within this, PREFECT_API_URL names a server that answers."""
    environment.apply(root)
    named = os.environ.get("PREFECT_API_URL")
    if named:
        yield named
        return
    running = service_addresses.running(root)
    if running is not None:
        with _named(running.prefect_api):
            yield running.prefect_api
        return
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log_file = root / "logs" / "prefect-server.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as output:
        child = lifeline.start(
            ["-m", "flows.prefect_server", str(port)], _quiet_server(), stdout=output, stderr=output, cwd=root
        )
    try:
        with _named(url):
            import prefect  # noqa: F401 - while the server starts

            wait_until_healthy(f"{url}/health", child, START_SECONDS, log_file)
            try:
                yield url
            finally:
                _send_what_is_left()
    finally:
        lifeline.end(child)


def free_port(preferred: int = 0) -> int:
    """`preferred` if it is free on the loopback address, otherwise (or for 0) any free port."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", preferred))
        except OSError:
            listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until_healthy(url: str, child: Popen[Any], seconds: float, log_file: Path) -> None:
    """Wait for a 200 from `url`. Raises `WorkError` with the log's last line when the child ends or takes too long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        if child.poll() is not None:
            break
        time.sleep(0.05)
    lines = log_file.read_text(errors="replace").strip().splitlines() if log_file.is_file() else []
    why = f"ended with status {child.returncode}" if child.poll() is not None else f"did not answer in {seconds:.0f} s"
    raise WorkError(f"The server at {url} {why}. The last line of {log_file}: {lines[-1] if lines else '(empty)'}")


def _send_what_is_left() -> None:
    """Send the run's logs and events while its server is there: at exit Prefect would try for more than a minute."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=10, at_exit=False)


@contextmanager
def _named(url: str) -> Iterator[None]:
    os.environ["PREFECT_API_URL"] = url
    try:
        yield
    finally:
        os.environ.pop("PREFECT_API_URL", None)


def _quiet_server() -> dict[str, str]:
    services = (
        "SCHEDULER",
        "LATE_RUNS",
        "CANCELLATION_CLEANUP",
        "PAUSE_EXPIRATIONS",
        "FOREMAN",
        "TASK_RUN_RECORDER",
        "EVENT_PERSISTER",
        "TRIGGERS",
        "EVENT_LOGGER",
        "DB_VACUUM",
    )
    return {
        "PREFECT_UI_ENABLED": "0",
        "PREFECT_SERVER_UI_ENABLED": "0",
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
        "PREFECT_API_URL": "",
        **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in services if name not in KEPT},
    }


# Without these a finished run's tasks and events would be missing from the pages later.
KEPT = ("TASK_RUN_RECORDER", "EVENT_PERSISTER")


def serve(port: int) -> None:
    """What the child does: Prefect's API on the loopback address."""
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="on",
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    lifeline.hold()
    serve(int(sys.argv[1]))
