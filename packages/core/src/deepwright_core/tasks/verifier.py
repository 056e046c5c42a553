"""Scoring in a process of its own, which may be killed.

An answer is written by a model and scorers are not ours: one can hang, or take the process with it. The verifier keeps
one child process, sends it batches as JSON lines, and replaces it when an answer takes too long. Such an answer counts
as wrong, and is counted (`Verifier.failures`), never silently.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType

from ..errors import WorkError
from .problem import Problem

START_SECONDS = 60.0
AHEAD = 16
PIPE_BYTES = 65536


class Verifier:
    """Scores (problem, answer) pairs; use as a context manager. `seconds` is the deadline of one answer."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.failures = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._outgoing = self._incoming = b""

    def __enter__(self) -> Verifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._child = None

    def _start(self) -> None:
        self._outgoing = self._incoming = b""
        self._child = subprocess.Popen(
            [sys.executable, "-m", "deepwright_core.tasks.verifier"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )
        assert self._child.stdin is not None
        os.set_blocking(self._child.stdin.fileno(), False)
        if self._line(START_SECONDS) != b"ready":
            self.close()
            raise WorkError("The verifier process did not start; see the messages above.")

    def _line(self, seconds: float) -> bytes | None:
        """The child's next line, or None when it is late or gone. Meanwhile it is sent what waits for it: a child that
        hangs does not read, and a parent that only wrote would hang with it."""
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        stdin, stdout = self._child.stdin.fileno(), self._child.stdout.fileno()
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if self._outgoing:
                selector.register(stdin, selectors.EVENT_WRITE)
            while b"\n" not in self._incoming:
                ready = selector.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    return None
                for key, _ in ready:
                    if key.fd == stdout:
                        data = os.read(stdout, PIPE_BYTES)
                        if not data:
                            return None
                        self._incoming += data
                    else:
                        try:
                            self._outgoing = self._outgoing[os.write(stdin, self._outgoing[:PIPE_BYTES]) :]
                        except BrokenPipeError:  # what it said before it died is still to be read
                            self._outgoing = b""
                        if not self._outgoing:
                            selector.unregister(stdin)
        line, self._incoming = self._incoming.split(b"\n", 1)
        return line

    def score(self, pairs: Sequence[tuple[Problem, str]]) -> list[float]:
        """A score for each pair, in order: 1.0 is correct; an answer whose scorer hung or died gets 0.0."""
        scores: list[float] = []
        sent = 0
        try:
            while len(scores) < len(pairs):
                if self._child is None:
                    self._start()
                    sent = len(scores)
                # A few ahead, so that the child never waits for its next answer.
                ahead = pairs[sent : len(scores) + AHEAD]
                self._outgoing += b"".join(json.dumps([asdict(p), a]).encode() + b"\n" for p, a in ahead)
                sent += len(ahead)
                value = _number(self._line(self.seconds))
                if value is None:
                    self.close()
                    self.failures += 1
                scores.append(value or 0.0)
        except BaseException:
            self.close()  # or the answers that are still to come would be taken for those of the next call
            raise
        return scores


def _number(line: bytes | None) -> float | None:
    try:
        return None if line is None else float(line)
    except ValueError:
        return None


def _serve() -> None:
    """The child: one score a line, until its input ends."""
    # What scorers and their libraries print goes to the error stream: the output is for scores alone.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        from .gym import score

        print("ready", file=answers, flush=True)
        for line in sys.stdin:
            fields, answer = json.loads(line)
            print(score(Problem(**fields), answer), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
