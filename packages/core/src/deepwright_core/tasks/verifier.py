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
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType

from ..errors import WorkError
from .problem import Problem

START_SECONDS = 60.0


class Verifier:
    """Scores (problem, answer) pairs; use as a context manager. `seconds` is the deadline of one answer."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.failures = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._rest = b""

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
        self._rest = b""
        self._child = subprocess.Popen(
            [sys.executable, "-m", "deepwright_core.tasks.verifier"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )
        if self._line(START_SECONDS) != b"ready":
            self.close()
            raise WorkError("The verifier process did not start; see the messages above.")

    def _line(self, seconds: float) -> bytes | None:
        """The child's next line, or None when it is late or gone."""
        assert self._child is not None and self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(seconds):
                    return None
                data = os.read(self._child.stdout.fileno(), 65536)
                if not data:
                    return None
                self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _send(self, pair: tuple[Problem, str]) -> None:
        assert self._child is not None and self._child.stdin is not None
        self._child.stdin.write(json.dumps([asdict(pair[0]), pair[1]]).encode() + b"\n")
        self._child.stdin.flush()

    def score(self, pairs: Sequence[tuple[Problem, str]]) -> list[float]:
        """A score for each pair, in order: 1.0 is correct; an answer whose scorer hung or died gets 0.0."""
        scores: list[float] = []
        sent = 0
        while len(scores) < len(pairs):
            if self._child is None:
                self._start()
                sent = len(scores)
            try:
                # A few ahead, so that the child never waits; never so many that both pipes can fill.
                while sent < min(len(pairs), len(scores) + 16):
                    self._send(pairs[sent])
                    sent += 1
                line = self._line(self.seconds)
            except BrokenPipeError:
                line = None
            if line is None:
                self.close()
                self.failures += 1
                scores.append(0.0)
            else:
                scores.append(float(line))
        return scores


def _serve() -> None:
    """The child: one score a line, until its input ends."""
    from .gym import score

    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        fields, answer = json.loads(line)
        print(score(Problem(**fields), answer), flush=True)


if __name__ == "__main__":
    _serve()
