"""Children that do not outlive their parent, however that ends.

A child calls `hold()` first thing: on Linux the kernel then ends it when its parent dies, SIGKILL included. Each child
leads a session of its own, so that Ctrl-C reaches only the parent, which then ends the child's whole group.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

_SET_PARENT_DEATH_SIGNAL = 1
PARENT_VARIABLE = "DEEPWRIGHT_PARENT"


def hold(signal_number: int = signal.SIGTERM) -> None:
    """End this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SET_PARENT_DEATH_SIGNAL, int(signal_number), 0, 0, 0)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent and int(parent) != os.getppid():
        sys.exit(1)  # it was gone before the kernel was asked


def start(arguments: Sequence[str], environment: dict[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
    """Start `python <arguments>` as a child in its own session."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, **(environment or {}), PARENT_VARIABLE: str(os.getpid())},
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        **options,
    )


def end(child: subprocess.Popen[Any], grace_seconds: float = 8.0) -> None:
    """End a child and everything that it started."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_seconds)
            if signal_number == signal.SIGTERM:
                continue  # the leader is gone; whoever is left in its group follows
    child.wait()


def main(arguments: list[str]) -> None:
    """`python -m flows.lifeline MODULE ...`: run a module that knows nothing of this, on the lifeline."""
    import runpy

    hold()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
