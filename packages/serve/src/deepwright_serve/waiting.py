"""The queue in front of an engine: a line for each tenant, and the lines are served in turn.

So a tenant that sends a thousand requests makes only its own line longer; another's first request is next but a few.
Left out: shares of different size (every tenant counts the same), and what already runs (only who comes next).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What can wait: it belongs to a tenant, and waits at most until `give_up` (seconds of `time.monotonic`)."""

    tenant: str
    give_up: float


Item = TypeVar("Item", bound=Waiter)


class FairQueue(Generic[Item]):
    """First come, first served within a tenant; round robin between tenants."""

    def __init__(self) -> None:
        # Ordered dicts, because those who wait may leave from the middle.
        self._lines: OrderedDict[str, OrderedDict[Item, None]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def push(self, item: Item) -> None:
        """Join the end of the own line; a tenant without one joins behind the others."""
        self._lines.setdefault(item.tenant, OrderedDict())[item] = None
        self._length += 1

    def pop(self) -> Item:
        """The next one; its tenant goes behind the others. Raises KeyError when nobody waits."""
        tenant, line = self._lines.popitem(last=False)
        item, _ = line.popitem(last=False)
        if line:
            self._lines[tenant] = line
        self._length -= 1
        return item

    def remove(self, item: Item) -> bool:
        """Leave the line; False: it was in none."""
        line = self._lines.get(item.tenant, OrderedDict())
        if item not in line:
            return False
        del line[item]
        if not line:
            del self._lines[item.tenant]
        self._length -= 1
        return True

    def late(self, now: float) -> list[Item]:
        """Take out those who have waited too long. Whoever came first in a line is the first to give up."""
        given_up = []
        for line in list(self._lines.values()):
            while line and (first := next(iter(line))).give_up <= now:
                given_up.append(first)
                self.remove(first)
        return given_up
