"""The block manager against a model of it: no leak, no double free, right owners, right content."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deepwright_core.engine.block_manager import BlockManager, block_digest, root_digest
from deepwright_core.errors import WorkError

BLOCKS = 6


def chain(tokens: list[int], salt: str = "") -> list[bytes]:
    """Digests of blocks of one token each."""
    digests = [root_digest(0, 0, salt)]
    for token in tokens:
        digests.append(block_digest(digests[-1], [token]))
    return digests[1:]


class Blocks(RuleBasedStateMachine):
    """Sequences of one-token blocks come, grow, and go. `content` says what a reader of each block would find."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(BLOCKS)
        self.sequences: dict[int, tuple[list[int], list[int]]] = {}  # name -> tokens, blocks
        self.content: dict[int, bytes] = {}
        self.names = 0

    def write(self, blocks: list[int], digests: list[bytes], publish: bool) -> None:
        for block, digest in zip(blocks, digests, strict=True):
            self.content[block] = digest
            if publish:
                self.manager.publish(block, digest)

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=4), publish=st.booleans())
    def arrive(self, tokens: list[int], publish: bool) -> None:
        digests = chain(tokens)
        shared = self.manager.match(digests)
        for block, digest in zip(shared, digests, strict=False):
            assert self.content[block] == digest
        needed = len(tokens) - len(shared)
        if needed > self.manager.available - self.manager.idle_among(shared):
            return
        self.manager.share(shared)
        fresh = self.manager.allocate(needed)
        owned = {block for _, blocks in self.sequences.values() for block in blocks}
        assert not owned & set(fresh) and not set(shared) & set(fresh)
        self.write(fresh, digests[len(shared) :], publish)
        self.sequences[self.names] = (tokens, shared + fresh)
        self.names += 1

    @precondition(lambda self: self.sequences and self.manager.available)
    @rule(data=st.data(), token=st.integers(0, 1), publish=st.booleans())
    def grow(self, data: st.DataObject, token: int, publish: bool) -> None:
        tokens, blocks = self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))]
        fresh = self.manager.allocate(1)
        tokens.append(token)
        self.write(fresh, chain(tokens)[-1:], publish)
        blocks += fresh

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        _, blocks = self.sequences.pop(data.draw(st.sampled_from(sorted(self.sequences))))
        self.manager.release(blocks)

    @rule()
    def forget(self) -> None:
        self.manager.forget()
        assert self.manager.match(chain([0])) == self.manager.match(chain([1])) == []

    @invariant()
    def nothing_is_lost_or_given_twice(self) -> None:
        owned = {block for _, blocks in self.sequences.values() for block in blocks}
        assert self.manager.used == len(owned)
        assert self.manager.available == BLOCKS - len(owned)
        assert all(1 <= block <= BLOCKS for block in owned)
        free, idle = self.manager._free, list(self.manager._idle)
        assert sorted([*free, *idle, *owned]) == list(range(1, BLOCKS + 1))

    @invariant()
    def owners_are_counted(self) -> None:
        for block in range(1, BLOCKS + 1):
            owners = sum(blocks.count(block) for _, blocks in self.sequences.values())
            assert self.manager._owners[block] == owners

    def teardown(self) -> None:
        for _, blocks in self.sequences.values():
            self.manager.release(blocks)
        assert self.manager.used == 0
        assert len(set(self.manager.allocate(BLOCKS))) == BLOCKS


TestBlocks = Blocks.TestCase
TestBlocks.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_least_recently_used_content_is_forgotten_first() -> None:
    manager = BlockManager(3)
    held = {}
    for token in (0, 1, 2):
        held[token] = manager.allocate(1)
        manager.publish(held[token][0], chain([token])[0])
    for token in (1, 0, 2):
        manager.release(held[token])
    manager.share(manager.match(chain([1])))  # used again, so no longer the oldest
    manager.release(held[1])
    assert manager.allocate(1) == held[0]
    assert [bool(manager.match(chain([token]))) for token in (0, 1, 2)] == [False, True, True]


def test_the_end_of_a_sequence_is_forgotten_before_its_beginning() -> None:
    manager = BlockManager(2)
    blocks = manager.allocate(2)
    for block, digest in zip(blocks, chain([5, 6]), strict=True):
        manager.publish(block, digest)
    manager.release(blocks)
    manager.allocate(1)
    assert manager.match(chain([5, 6])) == blocks[:1]


def test_digests_tell_salts_versions_adapters_and_histories_apart() -> None:
    roots = {root_digest(0, 0, ""), root_digest(1, 0, ""), root_digest(0, 1, ""), root_digest(0, 0, "a")}
    assert len(roots | {root_digest(0, 0, "b")}) == 5
    assert chain([1, 2])[1] != chain([2, 2])[1]
    assert chain([1], "a") != chain([1], "b")


def test_a_second_release_and_an_impossible_allocation_are_refused() -> None:
    manager = BlockManager(2)
    blocks = manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(WorkError, match="released more often"):
        manager.release(blocks)
    with pytest.raises(WorkError, match="3 cache blocks were asked for and 2 are available"):
        manager.allocate(3)
