"""What the person at the terminal sees while stages run.

On a terminal a live line for the phase at hand (bar, rate, time left, current figures); elsewhere a plain line every
few seconds. Both also send a line to the log now and then, which is what the workflow's run page shows.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars

from deepwright_core.tracking import Progress

log = logging.getLogger("deepwright.progress")

PLAIN_EVERY_SECONDS = 5.0
LOG_EVERY_SECONDS = 10.0


class Display(Progress, Protocol):
    """Progress of the phases of one stage after another."""

    def stage(self, name: str) -> None:
        """The next stage begins."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """No more progress; the terminal is as before."""


class _Pace:
    """Counts one phase: how fast it goes, how long it will take."""

    def __init__(self) -> None:
        self.stage = ""
        self.description = ""
        self.total = self.first = self.completed = 0
        self.note = ""
        self._started = time.monotonic()
        self._logged = float("-inf")

    def begin(self, description: str, total: int, completed: int) -> None:
        self.description, self.total, self.first, self.completed = description, total, completed, completed
        self.note = ""
        self._started = time.monotonic()
        self._logged = float("-inf")

    def rate(self) -> float:
        return (self.completed - self.first) / max(time.monotonic() - self._started, 1e-9)

    def line(self) -> str:
        rate = self.rate()
        left = f", {duration((self.total - self.completed) / rate)} left" if rate > 0 and self.total else ""
        note = f"  {self.note}" if self.note else ""
        return f"{self.stage} · {self.description}: {self.completed}/{self.total} ({rate_text(rate)}{left}){note}"

    def to_log(self) -> None:
        now = time.monotonic()
        if now - self._logged >= LOG_EVERY_SECONDS or self.completed >= self.total:
            self._logged = now
            log.info("%s", self.line())


class LiveDisplay:
    """Rich's bars on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = _Pace()
        self._bars: RichBars | None = None
        self._task: TaskID | None = None

    def stage(self, name: str) -> None:
        self._clear()
        self._pace.stage = name

    def start(self, description: str, total: int, completed: int = 0) -> None:
        self._clear()
        self._pace.begin(description, total, completed)
        self._bars = RichBars(
            TextColumn("[bold]{task.fields[stage]:<9}[/bold] {task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", style="cyan"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self._console,
            refresh_per_second=4,
            transient=True,
        )
        self._task = self._bars.add_task(
            description, total=total, completed=completed, stage=self._pace.stage, rate="", note=""
        )
        self._bars.start()

    def advance(self, completed: int, note: str = "") -> None:
        self._pace.completed = completed
        self._pace.note = note or self._pace.note
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=completed, note=self._pace.note, rate=rate_text(self._pace.rate()))
        self._pace.to_log()

    def say(self, text: str) -> None:
        (self._bars.console if self._bars is not None else self._console).print(text, highlight=False, markup=False)
        log.info("%s", text)

    def close(self) -> None:
        self._clear()

    def _clear(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._task = None


class PlainDisplay:
    """A line every few seconds, for files and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._pace = _Pace()
        self._printed = 0.0

    def stage(self, name: str) -> None:
        self._pace.stage = name

    def start(self, description: str, total: int, completed: int = 0) -> None:
        self._pace.begin(description, total, completed)
        self._print(f"{self._pace.stage} · {description} ({completed}/{total})")

    def advance(self, completed: int, note: str = "") -> None:
        self._pace.completed = completed
        self._pace.note = note or self._pace.note
        if time.monotonic() - self._printed >= PLAIN_EVERY_SECONDS or completed >= self._pace.total:
            self._print(self._pace.line())
        self._pace.to_log()

    def say(self, text: str) -> None:
        self._print(text)
        log.info("%s", text)

    def close(self) -> None:
        return

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def display(console: Console | None = None) -> Display:
    """The display that suits where the output goes (standard error: results go to standard output)."""
    console = console or Console(stderr=True)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(console)


def duration(seconds: float) -> str:
    """Seconds as people say them: `0.4 s`, `12 s`, `3 min 05 s`, `1 h 02 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def rate_text(rate: float) -> str:
    """A rate with three digits: `12.3/s`, or `4.1 s each` when it is slow."""
    if 0 < rate < 1:
        return f"{1 / rate:.3g} s each"
    return f"{rate:.3g}/s"


def scaled(value: float, unit: str = "") -> str:
    """A large number with its prefix: `1.3 M`, `420 G`."""
    prefix: Any
    for limit, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".strip()
