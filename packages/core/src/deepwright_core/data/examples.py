"""Conversations for supervised training, packed into rows.

Several short conversations share a row; each is a document of its own, so none sees another. Only the tokens that an
assistant wrote are trained. Rows are made anew for each epoch from a seeded permutation, and a batch depends on
nothing but (seed, step).

Shapes: B rows, S inputs of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import RequestError

Example = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class ExampleBatch:
    """tokens_BS1, segments_BS1: [B, S + 1]; trained_BS1 and real_BS1 (no padding): bool."""

    tokens_BS1: Tensor
    segments_BS1: Tensor
    trained_BS1: Tensor
    real_BS1: Tensor


class PackedExamples:
    """Batches of packed examples (ids and, for each, whether it is trained)."""

    def __init__(
        self, examples: Sequence[Example], batch_size: int, sequence_length: int, pad_id: int, seed: int
    ) -> None:
        longest = max((len(ids) for ids, _ in examples), default=0)
        if not examples:
            raise RequestError("There are no examples to train on; raise the number of training problems.")
        if longest > sequence_length + 1:
            raise RequestError(
                f"sequence_length is {sequence_length}, but the longest example has {longest} tokens; "
                f"expected at least {longest - 1}."
            )
        self.examples, self.batch_size, self.length = examples, batch_size, sequence_length + 1
        self.pad_id, self.seed = pad_id, seed
        self._epochs: list[list[list[int]]] = []

    def _rows(self, epoch: int) -> list[list[int]]:
        """Which examples share each row: next fit, in the epoch's order."""
        while len(self._epochs) <= epoch:
            order = np.random.default_rng([self.seed, len(self._epochs)]).permutation(len(self.examples))
            rows: list[list[int]] = [[]]
            room = self.length
            for n in order.tolist():
                size = len(self.examples[n][0])
                if size > room:
                    rows.append([])
                    room = self.length
                rows[-1].append(n)
                room -= size
            self._epochs.append(rows)
        return self._epochs[epoch]

    def batch(self, step: int) -> ExampleBatch:
        """The batch of a step."""
        epoch, place = 0, step * self.batch_size
        rows: list[list[int]] = []
        while len(rows) < self.batch_size:
            of_epoch = self._rows(epoch)
            if place < len(of_epoch):
                rows += of_epoch[place : place + self.batch_size - len(rows)]
                place = len(of_epoch)
            place -= len(of_epoch)
            epoch += 1
        shape = (self.batch_size, self.length)
        tokens, segments = np.full(shape, self.pad_id, np.int64), np.full(shape, -1, np.int64)
        trained = np.zeros(shape, bool)
        for r, row in enumerate(rows):
            start = 0
            for segment, n in enumerate(row):
                ids, mask = self.examples[n]
                here = slice(start, start + len(ids))
                tokens[r, here], segments[r, here], trained[r, here] = ids, segment, mask
                start += len(ids)
        segments_BS1 = torch.from_numpy(segments)
        return ExampleBatch(torch.from_numpy(tokens), segments_BS1, torch.from_numpy(trained), segments_BS1 >= 0)
