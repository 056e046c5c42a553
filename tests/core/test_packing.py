"""Packing: every position once an epoch, boundaries kept, a batch depends on nothing but seed and step."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deepwright_core.data.corpus import Corpus, CorpusWriter, dtype_for
from deepwright_core.data.packing import PackedBatches
from deepwright_core.errors import RequestError

BOS, EOS = 0, 1


def write(directory: Path, lengths: list[int], vocab_size: int = 60_000, split: str = "train") -> Path:
    """Documents whose inner ids are all different, so that every position can be recognised."""
    dtype = dtype_for(vocab_size)
    following = 2
    with CorpusWriter(directory, split, dtype) as writer:
        for length in lengths:
            writer.append([BOS, *range(following, following + length - 2), EOS])
            following += length - 2
    (directory / "manifest.json").write_text(json.dumps({"dtype": dtype.name}))
    return directory


LENGTHS = [2, 9, 30, 3, 200, 17, 5, 64, 11, 2, 41]


def stream(batches: PackedBatches, steps: range) -> list[tuple[int, int]]:
    """Targets, as (segment, token), of some steps."""
    seen = []
    for step in steps:
        tokens, segments = batches.batch(step)
        seen += list(zip(segments[:, 1:].flatten().tolist(), tokens[:, 1:].flatten().tolist(), strict=True))
    return seen


@pytest.mark.parametrize(("batch_size", "length"), [(1, 7), (3, 16), (4, 33), (2, 384), (1, 1000)])
def test_every_position_is_a_target_once_in_each_epoch(tmp_path: Path, batch_size: int, length: int) -> None:
    batches = PackedBatches(write(tmp_path, LENGTHS), "train", batch_size, length, seed=3)
    total, epochs = sum(LENGTHS), 4
    windows = -(-epochs * total // length)
    counts = Counter(stream(batches, range(-(-windows // batch_size))))
    for epoch in range(epochs):
        for document, size in enumerate(LENGTHS):
            ids = batches.corpus[document].tolist()
            segment = epoch * len(LENGTHS) + document
            for token in ids:
                # The very first token of the whole stream is an input only.
                if (segment, token) in counts or token != BOS:
                    assert counts[segment, token] == 1
            assert size == len(ids)
    inside = [key for key in counts if key[0] < epochs * len(LENGTHS)]
    assert len(inside) == epochs * total - 1


def test_inputs_and_targets_are_neighbours_of_the_same_document(tmp_path: Path) -> None:
    batches = PackedBatches(write(tmp_path, LENGTHS), "train", 4, 50, seed=1)
    for step in range(6):
        tokens, segments = batches.batch(step)
        assert tokens.shape == segments.shape == (4, 51)
        assert tokens.dtype == segments.dtype == torch.int64
        for row_tokens, row_segments in zip(tokens.tolist(), segments.tolist(), strict=True):
            for n in range(50):
                document = batches.corpus[row_segments[n] % len(LENGTHS)].tolist()
                if row_segments[n] == row_segments[n + 1]:
                    assert [row_tokens[n], row_tokens[n + 1]] in [document[i : i + 2] for i in range(len(document))]
                else:
                    assert row_tokens[n] == EOS and row_tokens[n + 1] == BOS


def test_a_batch_depends_only_on_seed_and_step(tmp_path: Path) -> None:
    write(tmp_path, LENGTHS)
    forwards = PackedBatches(tmp_path, "train", 3, 20, seed=5)
    wanted = [forwards.batch(step) for step in range(40)]
    resumed = PackedBatches(tmp_path, "train", 3, 20, seed=5)
    for step in (39, 0, 17, 17, 3, 38):
        tokens, segments = resumed.batch(step)
        assert torch.equal(tokens, wanted[step][0]) and torch.equal(segments, wanted[step][1])
    other = PackedBatches(tmp_path, "train", 3, 20, seed=6)
    assert any(not torch.equal(other.batch(step)[0], wanted[step][0]) for step in range(3))


def test_epochs_are_dealt_in_different_orders(tmp_path: Path) -> None:
    batches = PackedBatches(write(tmp_path, [20] * 50), "train", 1, 20, seed=0)
    orders = [
        [int(batches.batch(step)[1][0, 10]) % 50 for step in range(epoch * 50, (epoch + 1) * 50)] for epoch in range(2)
    ]
    assert orders[0] != orders[1]


def test_windows_of_a_long_document_are_spread_over_the_epoch(tmp_path: Path) -> None:
    batches = PackedBatches(write(tmp_path, [5000] + [50] * 100), "train", 1, 50, seed=0)
    long = [int(batches.batch(step)[1][0, 0]) == 0 for step in range(batches.windows_per_epoch)]
    changes = sum(a != b for a, b in itertools.pairwise(long))
    assert changes > 50  # in one piece it would be 2


def test_validation_is_the_same_for_every_seed(tmp_path: Path) -> None:
    write(tmp_path, LENGTHS, split="validation")
    one, other = (PackedBatches(tmp_path, "validation", 2, 16, seed=seed) for seed in (1, 2))
    for step in range(one.steps_per_epoch):
        assert torch.equal(one.batch(step)[0], other.batch(step)[0])


def test_small_vocabularies_take_two_bytes_and_large_ones_four(tmp_path: Path) -> None:
    assert dtype_for(2**16) == np.uint16 and dtype_for(2**16 + 1) == np.uint32
    write(tmp_path, [70_000], vocab_size=100_000)
    assert Corpus(tmp_path, "train")[0].max() == 69_999
    assert (tmp_path / "train.bin").stat().st_size == 280_000


def test_unusable_corpora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        PackedBatches(tmp_path, "train", 1, 8)
    write(tmp_path, LENGTHS)
    with pytest.raises(RequestError, match="no usable split 'validation'"):
        PackedBatches(tmp_path, "validation", 1, 8)
    with pytest.raises(RequestError, match="batch_size is 0"):
        PackedBatches(tmp_path, "train", 0, 8)
    data = (tmp_path / "train.bin").read_bytes()
    (tmp_path / "train.bin").write_bytes(data[:-2])
    with pytest.raises(RequestError, match="its offsets say"):
        PackedBatches(tmp_path, "train", 1, 8)
    write(tmp_path, [])
    with pytest.raises(RequestError, match="is empty"):
        PackedBatches(tmp_path, "train", 1, 8)
