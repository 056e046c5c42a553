"""Which replica has likely cached the beginning of a prompt: the one that last took a prompt which began alike.

A prompt leaves marks at its first 64 tokens, its first 128, 256 and so on, as far as it reaches; the longest mark that
is known decides. So conversations that share a system prompt go where that is cached, and the next turn of one of them
goes where its earlier turns are. Tenants and adapters leave marks of their own, as they have cached prefixes of their
own. Only a guess: what replicas evict meanwhile is not told here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

FIRST_MARK = 64
MOST_MARKS = 65536


class Affinity:
    """Marks of prompts and the numbers of the replicas that took them, the longest unused forgotten first."""

    def __init__(self, most: int = MOST_MARKS) -> None:
        self._most = most
        self._places: OrderedDict[bytes, int] = OrderedDict()

    def find(self, owner: str, prompt: Sequence[int]) -> int | None:
        """The replica that last took the longest known beginning of this prompt, if any did."""
        for mark in reversed(list(_marks(owner, prompt))):
            if mark in self._places:
                self._places.move_to_end(mark)
                return self._places[mark]
        return None

    def remember(self, owner: str, prompt: Sequence[int], place: int) -> None:
        """A replica took this prompt."""
        for mark in _marks(owner, prompt):
            self._places[mark] = place
            self._places.move_to_end(mark)
        while len(self._places) > self._most:
            self._places.popitem(last=False)


def _marks(owner: str, prompt: Sequence[int]) -> Iterator[bytes]:
    digest = hashlib.sha256(f"{len(owner)}:{owner}".encode())
    begin, end = 0, FIRST_MARK
    while end <= len(prompt):
        digest.update(array("q", prompt[begin:end]).tobytes())
        yield digest.digest()
        begin, end = end, 2 * end
