"""The correspondence between our tensors and a published checkpoint's: one piece for each of theirs.

A piece says that one of their tensors is one of ours, or some rows of it (their experts lie apart, ours are stacked).
Reading and writing a checkpoint use the same pieces, so the two cannot drift apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RequestError
from ..model.tensor_files import NAME_OF

Shape = tuple[int, ...]
CHUNK_BYTES = 64 * 2**20


def rows_at_once(shape: Shape, multiple: int) -> int:
    """How many rows to read and write at once: about CHUNK_BYTES in float32, in multiples of a block's rows."""
    row = 4 * math.prod(shape[1:])
    return max(CHUNK_BYTES // max(row, 1) // multiple, 1) * multiple


class Order(Protocol):
    """A way in which rows of their tensor are ordered differently from ours."""

    def to_ours(self, theirs: Tensor) -> Tensor: ...

    def to_theirs(self, ours: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class HalvesToPairs:
    """Rotary rows of a head: theirs are all first members of pairs and then all second ones, ours are pairs."""

    head_dim: int

    def to_ours(self, theirs: Tensor) -> Tensor:
        return theirs.unflatten(0, (-1, 2, self.head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()

    def to_theirs(self, ours: Tensor) -> Tensor:
        return ours.unflatten(0, (-1, self.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2).contiguous()


@dataclass(frozen=True)
class Piece:
    """theirs: name on disk, of `shape`. ours: name of our tensor; `part` indexes its first dimensions (a contiguous
    piece of it, () for all of it) and `first` is the place of that part's first element.

    order: how rows are reordered. quantised: an FP8 checkpoint stores it in blocks with scales.
    dtype: the one that it always has, whatever the checkpoint's. copy: another piece already fills ours; theirs
    repeats it, and may be absent. written: whether a checkpoint that we write has it.
    """

    theirs: str
    ours: str
    shape: Shape
    part: tuple[int | slice, ...] = ()
    first: int = 0
    order: Order | None = None
    quantised: bool = False
    dtype: torch.dtype | None = None
    copy: bool = False
    written: bool = True

    @property
    def optional(self) -> bool:
        """A reader can do without: a copy, or a tensor without elements."""
        return self.copy or math.prod(self.shape) == 0

    def to_ours(self, theirs: Tensor) -> Tensor:
        """Their tensor with its rows in our order."""
        return theirs if self.order is None else self.order.to_ours(theirs)

    def to_theirs(self, ours: Tensor) -> Tensor:
        """Our part with its rows in their order."""
        return ours if self.order is None else self.order.to_theirs(ours)


def chunks(piece: Piece, block_rows: int) -> list[tuple[int, int]]:
    """Rows (start, stop) to read and write at once, in whole blocks; reordered rows need each other and go together."""
    rows = piece.shape[0]
    at_once = max(rows, 1) if piece.order else rows_at_once(piece.shape, block_rows)
    return [(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in another dtype; `RequestError` when it cannot hold them."""
    narrow = values.to(dtype)
    if dtype != values.dtype and not torch.equal(narrow.isfinite(), values.isfinite()):
        raise RequestError(f"'{name}' has values that {NAME_OF[dtype]} cannot hold; convert it to another dtype.")
    return narrow


def stacked(theirs: str, ours: str, shape: Shape, expert: int, start: int, stop: int) -> Piece:
    """Rows start..stop of one expert of a stacked tensor of `shape` [experts, rows, columns]."""
    _, rows, columns = shape
    first = (expert * rows + start) * columns
    return Piece(theirs, ours, (stop - start, columns), (expert, slice(start, stop)), first, quantised=True)


def without_place(shapes: Mapping[str, Shape], pieces: Iterable[Piece], format_name: str) -> list[str]:
    """A sentence for each of our tensors that the pieces do not fill exactly once."""
    filled = dict.fromkeys(shapes, 0)
    for piece in pieces:
        if not piece.copy:
            filled[piece.ours] += math.prod(piece.shape)
    return [
        f"'{name}' has no place in a checkpoint of the format {format_name}."
        for name, count in filled.items()
        if count != math.prod(shapes[name])
    ]


def check_places(shapes: Mapping[str, Shape], pieces: Iterable[Piece], format_name: str) -> None:
    """Refuse a model that has tensors of which the format knows nothing."""
    problems = without_place(shapes, pieces, format_name)
    if problems:
        raise RequestError(problems)
