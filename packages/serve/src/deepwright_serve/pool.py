"""Several engines behind one name: what `EngineThread` offers, over replicas of one model.

A prompt goes to the replica that likely has its beginning cached, unless that one has much more to do than another;
then, and when nobody knows the beginning, to the one with the least to do. A replica whose engine broke takes no more;
its requests were told by its own thread, and the others go on. The pool is broken when all of them are.

Left out: moving what runs from one replica to another, replicas on several machines (put a balancer in front of
servers), and adding replicas while it runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from weakref import WeakKeyDictionary

from .affinity import Affinity
from .refusal import Refusal
from .scheduling import EngineThread, Ticket

log = logging.getLogger("deepwright.serve")

# The replica with the prompt's beginning is taken while its open answers are at most BUSIER times the least, and SLACK.
BUSIER, SLACK = 1.5, 4


class EnginePool:
    """Runs the threads of several engines of one model. Everything is called on the event loop."""

    def __init__(self, replicas: Sequence[EngineThread]) -> None:
        self.replicas = tuple(replicas)
        self._affinity = Affinity()
        self._takers: WeakKeyDictionary[Ticket, EngineThread] = WeakKeyDictionary()
        self._told: set[int] = set()

    @property
    def working(self) -> list[int]:
        """The numbers of the replicas whose engine has not stopped."""
        left = [number for number, replica in enumerate(self.replicas) if replica.broken is None]
        for number in set(range(len(self.replicas))) - set(left) - self._told:
            self._told.add(number)
            log.error("replica %d takes no more requests: %s", number, self.replicas[number].broken)
        return left

    @property
    def capacity(self) -> int:
        """Answers that may run or wait, in the replicas that work."""
        return sum(self.replicas[number].capacity for number in self.working)

    @property
    def open(self) -> int:
        """Answers that run or wait."""
        return sum(replica.open for replica in self.replicas)

    @property
    def answered(self) -> int:
        """Answers that were completed."""
        return sum(replica.answered for replica in self.replicas)

    @property
    def failed(self) -> int:
        """Answers that an engine broke off."""
        return sum(replica.failed for replica in self.replicas)

    @property
    def broken(self) -> str | None:
        """Why no replica works any more; None while one does."""
        if self.working:
            return None
        return "; ".join(f"replica {number}: {replica.broken}" for number, replica in enumerate(self.replicas))

    @property
    def last_token_at(self) -> float:
        """When the replica that has been silent for longest generated its last token, of those that work."""
        return min((self.replicas[number].last_token_at for number in self.working), default=-float("inf"))

    def start(self) -> None:
        """Begin; must be called on the event loop that the requests live on."""
        for replica in self.replicas:
            replica.start()

    def interrupt(self) -> None:
        """End after the steps in progress; what still runs is told so."""
        for replica in self.replicas:
            replica.interrupt()

    async def stop(self, limit: float = 10.0) -> None:
        """Interrupt, and wait until the threads have ended."""
        await asyncio.gather(*(replica.stop(limit) for replica in self.replicas))

    def submit(self, tickets: Iterable[Ticket]) -> None:
        """Hand answers to the replicas, all or none; raises `Refusal` when there is no room.

        The answers to one prompt stay together where that is possible, because they share its cache.
        """
        tickets = list(tickets)
        if not self.working:
            raise Refusal(503, f"The engines have stopped: {self.broken}.", code="engine_failed")
        roomiest = max((self.replicas[number] for number in self.working), key=_room)
        if sum(_room(self.replicas[number]) for number in self.working) < len(tickets):
            roomiest.submit(tickets)  # it says that there is no room, and when there may be
        by_prompt: dict[int, list[Ticket]] = {}
        for ticket in tickets:
            by_prompt.setdefault(id(ticket.prompt), []).append(ticket)
        try:
            for together in by_prompt.values():
                taker = self._choose(together[0], len(together))
                for group in [together] if _room(self.replicas[taker]) >= len(together) else [[t] for t in together]:
                    self._give(group, self._choose(group[0], len(group)))
        except Refusal:  # that replica broke just now
            for ticket in tickets:
                self.cancel(ticket)
            raise

    def _choose(self, ticket: Ticket, places: int) -> int:
        """The number of the replica that a prompt goes to."""
        working = self.working
        least = min(working, key=lambda number: self.replicas[number].open)
        known = self._affinity.find(_owner(ticket), ticket.prompt)
        if known is None or known not in working:
            return least
        replica = self.replicas[known]
        calm = replica.open <= BUSIER * self.replicas[least].open + SLACK
        return known if calm and _room(replica) >= places else least

    def _give(self, tickets: list[Ticket], number: int) -> None:
        self.replicas[number].submit(tickets)
        self._affinity.remember(_owner(tickets[0]), tickets[0].prompt, number)
        for ticket in tickets:
            self._takers[ticket] = self.replicas[number]

    def cancel(self, ticket: Ticket) -> None:
        """Stop an answer, whatever its state; its sink hears nothing more."""
        taker = self._takers.get(ticket)
        if taker is not None:
            taker.cancel(ticket)

    async def wait_for_token(self) -> None:
        """Return when any engine next generates a token for anybody."""
        waits = [asyncio.ensure_future(replica.wait_for_token()) for replica in self.replicas]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


Engines = EngineThread | EnginePool
"""What answers for a model."""


def _owner(ticket: Ticket) -> str:
    """With whom a ticket shares cached prefixes."""
    return f"{ticket.adapter}\0{ticket.tenant}"


def _room(replica: EngineThread) -> int:
    return replica.capacity - replica.open
