"""Packed examples: each once an epoch, whole, alone in its document, trained only where it says so."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch

from deepwright_core.data.examples import Example, ExampleBatch, PackedExamples
from deepwright_core.errors import RequestError

PAD = 0


def examples(count: int = 23) -> list[Example]:
    """Example n is its number, repeated; between 2 and 8 tokens, of which the second half is trained."""
    sizes = [2 + (5 * n) % 7 for n in range(count)]
    return [([n + 1] * size, [place >= size // 2 for place in range(size)]) for n, size in enumerate(sizes)]


def documents(batch: ExampleBatch) -> list[tuple[list[int], list[bool]]]:
    """The documents of a batch, taken apart by their segments."""
    found = []
    for tokens, segments, trained in zip(batch.tokens_BS1, batch.segments_BS1, batch.trained_BS1, strict=True):
        for segment in segments.unique().tolist():
            if segment >= 0:
                here = segments == segment
                found.append((tokens[here].tolist(), trained[here].tolist()))
                assert here.nonzero().flatten().diff().eq(1).all()  # a document is one piece
    return found


def epoch_of(packed: PackedExamples, rows: int, start: int = 0) -> list[ExampleBatch]:
    """That many rows' worth of batches of one row."""
    return [packed.batch(step) for step in range(start, start + rows)]


def rows_of_an_epoch(packed: PackedExamples) -> int:
    """How many rows the first epoch has: until some example comes again."""
    seen: Counter[int] = Counter()
    for row in range(1000):
        seen.update(ids[0] for ids, _ in documents(packed.batch(row)))
        if max(seen.values()) > 1:
            return row
    raise AssertionError("no example came twice")


def test_every_example_once_an_epoch_whole_and_with_its_mask() -> None:
    given = examples()
    packed = PackedExamples(given, 1, 15, PAD, seed=3)
    rows = rows_of_an_epoch(packed)
    found = [document for batch in epoch_of(packed, rows) for document in documents(batch)]
    assert sorted(found) == sorted((ids, mask) for ids, mask in given)


def test_padding_is_marked_everywhere() -> None:
    packed = PackedExamples(examples(), 4, 15, PAD, seed=3)
    for step in range(6):
        batch = packed.batch(step)
        assert batch.tokens_BS1.shape == (4, 16)
        assert torch.equal(batch.real_BS1, batch.segments_BS1 >= 0)
        assert torch.equal(batch.tokens_BS1 == PAD, ~batch.real_BS1)
        assert not (batch.trained_BS1 & ~batch.real_BS1).any()


def test_rows_are_shared() -> None:
    """Next fit: an example begins a new row only if it does not fit into the last one."""
    packed = PackedExamples(examples(), 1, 15, PAD, seed=3)
    batches = epoch_of(packed, rows_of_an_epoch(packed))
    for batch, following in pairwise(batches):
        room = int((~batch.real_BS1).sum())
        first = int((following.segments_BS1 == 0).sum())
        assert first > room


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    one, other = PackedExamples(examples(), 3, 15, PAD, seed=3), PackedExamples(examples(), 3, 15, PAD, seed=3)
    forwards = [one.batch(step) for step in range(12)]
    backwards = [other.batch(step) for step in reversed(range(12))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert torch.equal(a.tokens_BS1, b.tokens_BS1) and torch.equal(a.segments_BS1, b.segments_BS1)
    different = PackedExamples(examples(), 3, 15, PAD, seed=4)
    assert any(not torch.equal(a.tokens_BS1, different.batch(n).tokens_BS1) for n, a in enumerate(forwards))


def test_batches_run_on_across_epochs_and_each_epoch_has_its_own_order() -> None:
    given = examples(6)
    single, batched = PackedExamples(given, 1, 15, PAD, seed=0), PackedExamples(given, 4, 15, PAD, seed=0)
    rows = torch.cat([single.batch(n).tokens_BS1 for n in range(20)])
    assert torch.equal(torch.cat([batched.batch(n).tokens_BS1 for n in range(5)]), rows)
    order = [ids[0] for n in range(20) for ids, _ in documents(single.batch(n))]
    epochs = [tuple(order[start : start + 6]) for start in range(0, len(order) - 5, 6)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5, 6] for epoch in epochs)
    assert len(set(epochs)) > 1


def test_an_example_may_fill_its_row_and_no_more() -> None:
    exact: Example = ([5] * 16, [True] * 16)
    assert PackedExamples([exact], 2, 15, PAD, seed=0).batch(0).tokens_BS1.tolist() == [[5] * 16] * 2
    with pytest.raises(
        RequestError, match="sequence_length is 14, but the longest example has 16 tokens; expected at "
    ):
        PackedExamples([exact], 2, 14, PAD, seed=0)


def test_no_examples_are_refused() -> None:
    with pytest.raises(RequestError, match="no examples to train on"):
        PackedExamples([], 1, 8, PAD, seed=0)
