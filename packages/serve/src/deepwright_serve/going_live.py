"""How a version goes live: loaded beside the one that answers, asked first, given the name, watched, taken back.

    load       the candidate runs beside the live model, as `NAME:candidate`; only the operator can ask it
    go_live    from one moment to the next the name is the candidate's; the model before is kept as `NAME:previous`
    (proving)  for some seconds the new one is watched: answers that fail, an engine that gives no token
    roll_back  the model before gets its name back; the new one finishes what it has begun and is ended
    proved     the model before is ended and its memory freed

What answers is never stopped for this, and no request is dropped. Whether a candidate is good enough is decided by
whoever asks it (see `check`); here is decided only whether it works. Everything is called on the event loop.

Left out: several candidates of one name, and shares of the traffic (a candidate gets none, then all).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import psutil
import torch

from deepwright_core.errors import RequestError
from deepwright_core.model.directory import find_model

from .loading import Loading
from .protocol.admin import AdminModel, AdminStatus, Change, State
from .refusal import Refusal
from .roster import Roster, Served

log = logging.getLogger("deepwright.serve")

# Fewer failures than this say nothing yet.
FEWEST_FAILURES = 3
LOOK_SECONDS = 0.1
PROBE_SECONDS = 5.0
# Beside weights and cache, a model needs memory for what a step computes.
HEADROOM = 1.15


def candidate_of(name: str) -> str:
    """What the operator calls the version of `name` that is not live yet."""
    return f"{name}:candidate"


def previous_of(name: str) -> str:
    """What the operator calls the version of `name` that was live before."""
    return f"{name}:previous"


class GoingLive:
    """The changes of a roster. `roots`: models are loaded only from below these directories.

    finish_seconds: how long a model that has lost its name may finish what it has begun; as long as a request may take,
    if none is to be cut off.
    """

    def __init__(self, roster: Roster, loading: Loading, roots: Sequence[Path], finish_seconds: float) -> None:
        self._roster = roster
        self._loading = loading
        self._roots = [root.resolve() for root in roots]
        self._finish_seconds = finish_seconds
        self._busy = asyncio.Lock()
        self._changes: dict[str, Change] = {}
        self._proving: dict[str, asyncio.Task[None]] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def status(self) -> AdminStatus:
        """Every loaded model, and how the latest change of each name went."""
        live = [_described(served.name, served, "live") for served in self._roster.models()]
        aside = [
            _described(key, served, "candidate" if key == candidate_of(served.name) else "previous")
            for key, served in self._roster.aside.items()
        ]
        return AdminStatus(models=live + aside, changes=list(self._changes.values()))

    async def load(self, name: str, directory: str, version: str) -> None:
        """Load a version beside what runs. `Refusal` when it may not, does not fit, or cannot be loaded."""
        path = self._allowed(directory)
        if self._busy.locked():
            raise Refusal(409, "Another model is being loaded; wait until it is there.", code="busy")
        async with self._busy:
            self._say(name, "loading", f"Version {version or path.name} is being loaded from {path}.")
            try:
                await self._end(self._roster.take_aside(candidate_of(name)))
                self._require_memory(path)
                served = await asyncio.to_thread(self._loading.load, path, name, version)
            except Refusal as refusal:
                self._say(name, "failed", refusal.message)
                raise
            except Exception as error:
                # Also what a broken checkpoint makes the libraries below raise: what runs must not suffer from it.
                log.warning("a model could not be loaded", exc_info=not isinstance(error, RequestError))
                reason = str(error) if isinstance(error, RequestError) else f"{type(error).__name__}: {error}"
                self._say(name, "failed", f"{path} could not be loaded: {reason}")
                raise Refusal(400, self._changes[name].message, param="directory", code="not_loadable") from None
            self._roster.put_aside(candidate_of(name), served)
            self._say(name, "loaded", f"Version {_named(served)} can be asked as {candidate_of(name)}.")

    async def discard(self, name: str) -> None:
        """End the candidate of a name."""
        candidate = self._roster.take_aside(candidate_of(name))
        if candidate is None:
            raise _no_candidate(name)
        self._say(name, "discarded", f"Version {_named(candidate)} was ended before it went live.")
        await self._end(candidate)

    def go_live(
        self, name: str, prove_seconds: float, failed_share: float, prove: Callable[[Served], Awaitable[None]]
    ) -> None:
        """Give the name to its candidate. `prove` raises `Refusal` when a model generates nothing."""
        if name in self._proving:
            raise Refusal(409, f"{name} is still proving its latest version; wait, or roll back.", code="busy")
        candidate = self._roster.take_aside(candidate_of(name))
        if candidate is None:
            raise _no_candidate(name)
        before = self._roster.replace(candidate)
        if before is None:
            self._say(name, "proved", f"Version {_named(candidate)} is live; there was none before it.")
            return
        self._roster.put_aside(previous_of(name), before)
        self._say(name, "proving", f"Version {_named(candidate)} is live in place of {_named(before)}.")
        task = asyncio.create_task(self._watch(candidate, prove_seconds, failed_share, prove))
        self._proving[name] = task
        task.add_done_callback(lambda ended: self._has_proved(name, ended))

    def roll_back(self, name: str, why: str) -> None:
        """Give the name back to the model before, which is still there until its successor has proved itself."""
        before = self._roster.take_aside(previous_of(name))
        if before is None:
            raise Refusal(
                409, f"{name} has no previous version any more: the one that is live has proved itself.",
                param="name", code="no_previous",
            )  # fmt: skip
        failed = self._roster.replace(before)
        assert failed is not None
        self._say(name, "rolled back", f"{_named(before)} is live again in place of {_named(failed)}: {why}")
        self._end_later(failed)
        if name in self._proving:
            self._proving[name].cancel()

    def remove(self, name: str) -> None:
        """Take a name away, with its candidate; what it has begun is finished."""
        if name in self._proving:
            raise Refusal(409, f"{name} is still proving its latest version; wait, or roll back.", code="busy")
        if [served.name for served in self._roster.models()] == [name]:
            raise Refusal(409, f"{name} is the only model; a server without one is of no use.", code="last_model")
        served = self._roster.remove(name)
        self._say(name, "removed", f"Version {_named(served)} was taken away.")
        self._end_later(served)
        self._end_later(self._roster.take_aside(candidate_of(name)))

    async def _watch(
        self, served: Served, seconds: float, failed_share: float, prove: Callable[[Served], Awaitable[None]]
    ) -> None:
        """Proving: roll back at the first sign of trouble; without one, end the model before."""
        answered, failed = served.thread.answered, served.thread.failed
        until = time.monotonic() + seconds
        probe_at = 0.0
        while (now := time.monotonic()) < until:
            trouble = _trouble(served, served.thread.answered - answered, served.thread.failed - failed, failed_share)
            if trouble is None and now >= probe_at:
                try:
                    await prove(served)
                except Refusal as refusal:
                    trouble = refusal.message
                probe_at = time.monotonic() + PROBE_SECONDS
            if trouble is not None:
                self._proving.pop(served.name, None)  # this task: rolling back must not cancel it
                self.roll_back(served.name, trouble)
                return
            await asyncio.sleep(min(LOOK_SECONDS, max(until - time.monotonic(), 0.0)))
        count, lost = served.thread.answered - answered, served.thread.failed - failed
        message = f"Version {_named(served)} has proved itself: in {seconds:g} s, {count} answers and {lost} failures."
        self._say(served.name, "proved", message)
        self._end_later(self._roster.take_aside(previous_of(served.name)))

    def _has_proved(self, name: str, task: asyncio.Task[None]) -> None:
        # After a trouble, the next version may be proving itself already: that entry is not this task's.
        if self._proving.get(name) is task:
            del self._proving[name]

    async def _end(self, served: Served | None) -> None:
        if served is not None:
            await self._roster.retire(served, self._finish_seconds)

    def _end_later(self, served: Served | None) -> None:
        task = asyncio.create_task(self._end(served))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _allowed(self, directory: str) -> Path:
        """The model directory, if it lies below one of the roots once every link in it is followed."""
        path = Path(directory)
        self._require_below(path)
        try:
            found = find_model(path.resolve())
        except RequestError as error:
            raise Refusal(400, str(error), param="directory", code="not_loadable") from None
        # A stage's result may name a directory anywhere.
        self._require_below(found)
        return found.resolve()

    def _require_below(self, path: Path) -> None:
        try:
            inside = path.is_absolute() and any(path.resolve().is_relative_to(root) for root in self._roots)
        except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
            inside = False
        if not inside:
            roots = ", ".join(map(str, self._roots))
            raise Refusal(
                403, f"directory is not below {roots}: only from there may models be loaded (--admin-models).",
                param="directory", code="directory_not_allowed",
            )  # fmt: skip

    def _require_memory(self, path: Path) -> None:
        device, _ = self._loading.place()
        needed = int(self._loading.bytes_of(path) * HEADROOM)
        replicas = self._loading.replicas if device.type == "cuda" else 1
        places = [device] if replicas == 1 else [torch.device("cuda", number) for number in range(replicas)]
        free = min(map(free_bytes, places))
        if needed > free:
            raise Refusal(
                507,
                f"The model needs about {needed / 2**30:.2f} GiB beside what runs, and {device} has "
                f"{free / 2**30:.2f} GiB free. Free memory, or start the server anew with this model.",
                code="no_memory",
            )

    def _say(self, name: str, state: str, message: str) -> None:
        log.info("%s: %s: %s", name, state, message)
        self._changes[name] = Change.model_validate({"name": name, "state": state, "message": message})


def free_bytes(device: torch.device) -> int:
    """Memory that another model could be given, in bytes."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds in reserve and nobody uses is free as well.
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _trouble(served: Served, answered: int, failed: int, failed_share: float) -> str | None:
    if served.thread.broken is not None:
        return f"its engine has stopped: {served.thread.broken}."
    if failed >= FEWEST_FAILURES and failed > failed_share * (answered + failed):
        return f"{failed} of its first {answered + failed} answers failed (allowed: {failed_share:.0%})."
    return None


def _named(served: Served) -> str:
    directory = served.directory
    return served.version or (str(directory) if directory is not None else served.name)


def _no_candidate(name: str) -> Refusal:
    return Refusal(409, f"{name} has no candidate; load one first.", param="name", code="no_candidate")


def _described(key: str, served: Served, state: State) -> AdminModel:
    return AdminModel(
        id=key,
        name=served.name,
        state=state,
        version=served.version,
        directory="" if served.directory is None else str(served.directory),
        created=served.created,
        open=served.thread.open,
        answered=served.thread.answered,
        failed=served.thread.failed,
    )
