"""Who owns which block of the cache, and which blocks can be used again.

Blocks are numbered; block 0 is never given away, because padding writes there. A block is either owned (its reference
count says by how many sequences), idle (nobody owns it, but its content is known and may be asked for again) or free.
Content is known by a chain of SHA-256 digests: a block's digest covers all tokens before it, the weights' version, the
adapter and the tenant's salt, so equal digests mean equal cache content, and no tenant can find another's prompt.
Idle blocks are evicted oldest first. Left out: cache on the host or the disk.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from ..errors import WorkError


def root_digest(weights_version: int, adapter: int, salt: str) -> bytes:
    """The start of a digest chain."""
    return hashlib.sha256(f"{weights_version}:{adapter}:{salt}".encode()).digest()


def block_digest(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The digest of a full block that follows the block (or root) with digest `previous`."""
    return hashlib.sha256(previous + array("q", tokens).tobytes()).digest()


class BlockManager:
    """Blocks 1..blocks, each free, idle or owned."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks, 0, -1))  # a stack; low numbers first
        self._idle: dict[int, None] = {}  # in order of release: the first is the least recently used
        self._owners = [0] * (blocks + 1)
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that some sequence owns."""
        return self.blocks - self.available

    def allocate(self, count: int) -> list[int]:
        """Give out `count` blocks of unknown content, forgetting the least recently used known ones if it must."""
        if count > self.available:
            raise WorkError(f"{count} cache blocks were asked for and {self.available} are available.")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block = next(iter(self._idle))
                del self._idle[block]
                del self._block_of[self._digest_of.pop(block)]
            self._owners[block] = 1
            taken.append(block)
        return taken

    def match(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of a digest chain. They are not owned yet: `share` them."""
        found = []
        for digest in digests:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def idle_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody owns: sharing them makes that many fewer available."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more owner of blocks that `match` found."""
        for block in blocks:
            self._owners[block] += 1
            self._idle.pop(block, None)

    def publish(self, block: int, digest: bytes) -> None:
        """Make the content of an owned, full block known. Another block of the same content keeps its place."""
        if digest not in self._block_of and block not in self._digest_of:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one ownership of each block.

        The last block of a sequence comes first in the order of eviction: a beginning is shared by more prompts.
        """
        for block in reversed(blocks):
            if self._owners[block] < 1:
                raise WorkError(f"Cache block {block} was released more often than it was taken.")
            self._owners[block] -= 1
            if self._owners[block] == 0:
                if block in self._digest_of:
                    self._idle[block] = None
                else:
                    self._free.append(block)

    def forget(self) -> None:
        """Drop all knowledge of content (the weights changed); owned blocks stay owned."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._digest_of.clear()
        self._block_of.clear()
