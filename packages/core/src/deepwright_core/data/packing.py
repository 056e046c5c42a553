"""Batches of packed sequences: documents one after the other, no padding, every position used once an epoch.

In each epoch the documents are put in a new seeded order and joined to one stream; the epochs' streams follow each
other without a gap, and windows of S + 1 tokens tile the whole, each sharing its first token with the last of the one
before. The windows that begin in an epoch are dealt out in a seeded order of their own, so that a batch is not S
pieces of one long file. All of it follows from (seed, step): to resume is to ask for the next step.

Shapes: B sequences of S inputs, S + 1 tokens each (targets are the tokens one later).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError
from .corpus import Corpus

# Validation is dealt out in one order whatever the run's seed: its first batches are the same fair sample for all.
VALIDATION_SEED = 0
EPOCHS_KEPT = 4


@dataclass(frozen=True)
class _Epoch:
    """documents: their order; ends: where each ends in the stream; windows: the order in which they are dealt out."""

    documents: np.ndarray
    ends: np.ndarray
    first_window: int
    windows: np.ndarray


class PackedBatches:
    """`batch(step)` is a pure function of (corpus, split, sizes, seed, step).

    `windows_per_epoch` is how many sequences hold each position once; `steps_per_epoch` how many batches that makes
    (the last of them may already begin the next epoch).
    """

    def __init__(self, corpus_dir: Path, split: str, batch_size: int, sequence_length: int, seed: int = 0) -> None:
        if batch_size < 1 or sequence_length < 1 or seed < 0:
            raise RequestError(
                f"batch_size is {batch_size}, sequence_length {sequence_length}, seed {seed}; "
                "expected at least 1, 1 and 0."
            )
        self.corpus = Corpus(corpus_dir, split)
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self._seed = VALIDATION_SEED if split == "validation" else seed
        self._lengths = np.diff(self.corpus.offsets)
        self.tokens = int(self.corpus.offsets[-1])
        if self.tokens < 2:
            raise RequestError(f"{corpus_dir}: split '{split}' is empty; give the data stage more text.")
        self._epochs: dict[int, _Epoch] = {}

    @property
    def windows_per_epoch(self) -> int:
        return -(-self.tokens // self.sequence_length)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.windows_per_epoch // self.batch_size)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(tokens_BS, segments_BS), both int64 [B, S + 1].

        A segment is one document in one epoch; it is `epoch * documents + document`. Where two neighbours differ, a
        new document begins: nothing is to be attended to or predicted across.
        """
        tokens_BS = np.empty((self.batch_size, self.sequence_length + 1), dtype=np.int64)
        segments_BS = np.empty_like(tokens_BS)
        for row in range(self.batch_size):
            start = self._window(step * self.batch_size + row) * self.sequence_length
            self._read(start, tokens_BS[row], segments_BS[row])
        return torch.from_numpy(tokens_BS), torch.from_numpy(segments_BS)

    def _window(self, number: int) -> int:
        """The window dealt out as the `number`-th. Epoch e owns the windows that begin in its stretch of stream."""
        epoch = self._epoch(number * self.sequence_length // self.tokens)
        return epoch.first_window + int(epoch.windows[number - epoch.first_window])

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            if len(self._epochs) >= EPOCHS_KEPT:
                del self._epochs[min(self._epochs)]
            first, end = (-(-n * self.tokens // self.sequence_length) for n in (number, number + 1))
            documents = np.random.default_rng([self._seed, number, 0]).permutation(len(self.corpus))
            windows = np.random.default_rng([self._seed, number, 1]).permutation(end - first)
            self._epochs[number] = _Epoch(documents, np.cumsum(self._lengths[documents]), first, windows)
        return self._epochs[number]

    def _read(self, start: int, tokens_S: np.ndarray, segments_S: np.ndarray) -> None:
        """Fill one sequence with the stream from `start` on, going on into the next epoch where one ends."""
        filled = 0
        while filled < len(tokens_S):
            number, position = divmod(start + filled, self.tokens)
            epoch = self._epoch(number)
            rank = int(np.searchsorted(epoch.ends, position, side="right"))
            document = int(epoch.documents[rank])
            left = int(epoch.ends[rank]) - position
            part = slice(filled, min(filled + left, len(tokens_S)))
            end = int(self.corpus.offsets[document + 1])
            tokens_S[part] = self.corpus.ids[end - left : end - left + part.stop - part.start]
            segments_S[part] = number * len(self.corpus) + document
            filled = part.stop
