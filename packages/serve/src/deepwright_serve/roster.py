"""Which models answer, and under which names: the roster.

    with service.roster.lease(request.model) as served:    # or Refusal 404
        ...served.tokenizer, served.thread, served.context...

A route leases the model for as long as it prepares a request (tokenizing happens off the event loop); once its answers
are submitted, the engine's thread counts them. `replace` gives a name to another model from one moment to the next:
requests that come later get the new one, and `retire` ends the old one when nothing of it is leased or open. Several
names may share a thread (adapters on one engine); the thread ends with the last of them.

Beside them stand models that are loaded and run, but that only the operator may ask for: one that is not live yet, one
that was and may have to come back.

Everything here is called on the event loop, so nothing needs a lock. Left out: loading models, and deciding which.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deepwright_core.tokenizer import Tokenizer

from .pool import Engines
from .refusal import Refusal

# How often a model that is to end is asked whether it still has work.
LOOK_SECONDS = 0.02


@dataclass(eq=False)
class Served:
    """A model as requests see it.

    context: most tokens that prompt and answer may have together. version: what of that name this is ("" unknown).
    adapter: the adapter of the engine that answers ("" none). directory: where it was loaded from, if from one.
    created: seconds since 1970.
    """

    name: str
    thread: Engines
    tokenizer: Tokenizer
    context: int
    version: str = ""
    adapter: str = ""
    directory: Path | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    leases: int = 0

    @property
    def busy(self) -> bool:
        """Whether a request is being prepared for it, or answered."""
        return self.leases > 0 or self.thread.open > 0


class Roster:
    """Models by name; the first is the one that is meant when a choice has to be made for somebody."""

    def __init__(self, models: Iterable[Served]) -> None:
        self._models = {served.name: served for served in models}
        self._aside: dict[str, Served] = {}
        self._ending: list[Served] = []
        self._running = False
        self._started: set[Engines] = set()

    # Asking -------------------------------------------------------------------------------------------

    def find(self, name: str, operator: bool = False) -> Served:
        """The model of a name (also of one aside, for the operator); `Refusal` 404 when there is none."""
        found = self._models.get(name) or (self._aside.get(name) if operator else None)
        if found is None:
            here = ", ".join(f"'{known}'" for known in self._models)
            raise Refusal(
                404, f"There is no model '{name}' here; this server has {here}.", param="model", code="model_not_found"
            )
        return found

    @contextmanager
    def lease(self, name: str, operator: bool = False) -> Iterator[Served]:
        """The model of a name, which is not ended while the lease lasts."""
        served = self.find(name, operator)
        served.leases += 1
        try:
            yield served
        finally:
            served.leases -= 1

    def models(self) -> list[Served]:
        """Those that everybody may ask for, in the order in which they came."""
        return list(self._models.values())

    @property
    def aside(self) -> Mapping[str, Served]:
        """Those that only the operator may ask for, by the names under which he does."""
        return self._aside

    def threads(self) -> list[Engines]:
        """The threads that answer, each once: also those of models aside, and of those that are ending."""
        everything = [*self._models.values(), *self._aside.values(), *self._ending]
        return list(dict.fromkeys(served.thread for served in everything))

    # Changing -----------------------------------------------------------------------------------------

    def replace(self, served: Served) -> Served | None:
        """Give `served` its name; returns the model that had it, which goes on with what it has begun."""
        self._start(served.thread)
        before = self._models.get(served.name)
        self._models[served.name] = served
        return before

    def remove(self, name: str) -> Served:
        """Take a name away; returns the model that had it."""
        served = self.find(name)
        del self._models[name]
        return served

    def put_aside(self, name: str, served: Served) -> None:
        """Have a model run that only the operator may ask for, under a name that nobody else's may be."""
        self._start(served.thread)
        self._aside[name] = served

    def take_aside(self, name: str) -> Served | None:
        """Take a model from those aside, running; None when there is none."""
        return self._aside.pop(name, None)

    async def retire(self, served: Served, limit: float) -> None:
        """Wait at most `limit` seconds until a model that has lost its name is idle; then end it and free its memory.

        What still runs then is told that it was cut off.
        """
        self._ending.append(served)
        try:
            until = time.monotonic() + limit
            while served.busy and time.monotonic() < until:
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._ending.remove(served)
        if served.thread not in self.threads():
            self._started.discard(served.thread)
            await served.thread.stop()
            # Modules and their hooks refer to each other: without this, the weights would stay for a while.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    async def start(self) -> None:
        """Start every thread; must be called on the event loop that the requests live on."""
        self._running = True
        for thread in self.threads():
            self._start(thread)

    async def stop(self) -> None:
        """End every thread."""
        self._running = False
        for thread in self.threads():
            await thread.stop()
        self._started.clear()

    def _start(self, thread: Engines) -> None:
        if self._running and thread not in self._started:
            self._started.add(thread)
            thread.start()
