"""What the routes work with: the roster of models, the limits, who may come in, and proof that it all still works."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from deepwright_core.engine import SamplingParams

from .edge import Door
from .going_live import GoingLive
from .keys import Keys
from .limits import Limits
from .metrics import Metrics
from .pool import Engines
from .protocol import ModelCard, Prices
from .refusal import Refusal
from .roster import Roster, Served
from .scheduling import EngineThread, Ticket
from .structured import Compiler
from .telling import Teller

# A token for somebody this recently proves as much as a probe would.
FRESH_SECONDS = 1.0


@dataclass
class Service:
    """What the routes work with. operator, changes: who may change what is served, and how; None: nobody.

    teller: who tells plugins of finished requests, where there are any that listen.
    """

    roster: Roster
    limits: Limits = field(default_factory=Limits)
    keys: Keys | None = None
    local: bool = True
    operator: Keys | None = None
    changes: GoingLive | None = None
    prices: Prices | None = None
    teller: Teller | None = None

    def __post_init__(self) -> None:
        self.door = Door(self.keys, self.local, operator=self.operator, header_bytes=self.limits.header_bytes)
        self.metrics = Metrics(self._threads)
        self.compiler = Compiler()
        self._probes: dict[EngineThread, asyncio.Task[None]] = {}

    def _threads(self) -> list[tuple[str, Engines]]:
        """The threads that generate, each under the first of its models' names."""
        names: dict[Engines, str] = {}
        for served in self.roster.models():
            names.setdefault(served.thread, served.name)
        return [(name, thread) for thread, name in names.items()]

    @property
    def first(self) -> str:
        """The name that is meant where a request may leave it out."""
        return self.roster.models()[0].name

    def cards(self) -> list[ModelCard]:
        """What can be asked. An adapter's parent is the model without one on the same engine."""
        models = self.roster.models()
        bare = {served.thread: served.name for served in models if not served.adapter}
        return [
            ModelCard(
                id=served.name,
                created=served.created,
                max_model_len=served.context,
                root=served.adapter or served.name,
                parent=bare.get(served.thread) if served.adapter else None,
            )
            for served in models
        ]

    def require_room_at_all(self, served: Served, answers: int) -> None:
        """Refuse a request that could not even run alone."""
        if answers > served.thread.capacity:
            most = served.thread.capacity
            raise Refusal(400, f"The request asks for {answers} answers; at most {most} are possible.")

    def require_ready(self) -> None:
        """Refuse when requests that come now would be refused."""
        if self.door.draining:
            raise Refusal(503, "The server is shutting down.", code="shutting_down")
        for served in self.roster.models():
            _require_working(served)
        if all(served.thread.open >= served.thread.capacity for served in self.roster.models()):
            raise Refusal(503, "Every place is taken.", code="queue_full")

    async def prove_alive(self) -> None:
        """Return once every model generated a token just now, for a probe or for anybody.

        `Refusal` when one does not within the deadline.
        """
        await asyncio.gather(*(self.prove(served) for served in self.roster.models()))

    async def prove(self, served: Served) -> None:
        """The same for one model: each of its engines, but for those whose place others have taken."""
        _require_working(served)
        working = [replica for replica in served.thread.replicas if replica.broken is None]
        await asyncio.gather(*(self._prove_engine(replica, served) for replica in working))

    async def _prove_engine(self, thread: EngineThread, served: Served) -> None:
        if time.monotonic() - thread.last_token_at < FRESH_SECONDS:
            return
        # Callers at the same time share one probe, and so do models that share an engine.
        probe = self._probes.get(thread)
        if probe is None:
            probe = self._probes[thread] = asyncio.create_task(self._generate_one(thread, served))
            probe.add_done_callback(lambda _: self._probes.pop(thread))
        await asyncio.shield(probe)

    async def _generate_one(self, thread: EngineThread, served: Served) -> None:
        limit = self.limits.health_seconds
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        ticket = Ticket([*served.tokenizer.begin_ids] or [0], params, sink=lambda item: None)
        seen = asyncio.ensure_future(thread.wait_for_token())
        try:
            # When every place is taken, the running requests are the probe.
            if thread.open < thread.capacity:
                thread.submit([ticket])
            async with asyncio.timeout(limit):
                await seen
        except TimeoutError:
            raise Refusal(503, f"No token was generated within {limit:g} s.", code="engine_stuck") from None
        finally:
            seen.cancel()
            thread.cancel(ticket)


def _require_working(served: Served) -> None:
    if served.thread.broken is not None:
        raise Refusal(503, f"The engine has stopped: {served.thread.broken}.", code="engine_failed")
