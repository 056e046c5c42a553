"""Cancelling, on the workflow's pages, a run that was started from a terminal.

A worker ends the runs that it started itself; nobody watches one that was typed. So the run asks for its own state now
and then, stops as for SIGTERM when that says so, and confirms that it was cancelled.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

POLL_SECONDS = 3.0
# Set by Prefect in the processes that its workers and runners start.
STARTED_BY_WORKER = "PREFECT__FLOW_RUN_ID"

_asked: list[UUID] = []


@contextmanager
def watched(run_id: str | None) -> Iterator[None]:
    """Within this, cancelling the flow run stops it."""
    if not run_id or os.environ.get(STARTED_BY_WORKER):
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(UUID(run_id), over), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(POLL_SECONDS)


def _watch(run_id: UUID, over: threading.Event) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        while not over.wait(POLL_SECONDS):
            try:
                state = client.read_flow_run(run_id).state
            except Exception:
                continue  # a server that does not answer is no reason to stop
            if state is not None and (state.is_cancelling() or state.is_cancelled()):
                _asked.append(run_id)
                os.kill(os.getpid(), signal.SIGTERM)
                return


def confirm() -> None:
    """Say that the runs that were to be cancelled have stopped (Prefect takes a SIGTERM for a crash)."""
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    while _asked:
        with get_client(sync_client=True) as client:
            message = "Stopped; the same request goes on from the last checkpoint."
            client.set_flow_run_state(_asked.pop(), Cancelled(message=message), force=True)
