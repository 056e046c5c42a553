"""Writing safetensors files piece by piece, in any order: memory holds one piece, not a file.

The layout is decided first, from names, dtypes and shapes; each file gets its header and its full size (so that a full
disk is noticed at once), and pieces go to their places. The format: eight bytes with the header's length, the header as
JSON (padded to a multiple of eight), the tensors' bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.tensor_files import INDEX_FILE, NAME_OF, WEIGHTS_FILE
from ..stage import write_atomically
from .piece import Shape


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def shards(tensors: Sequence[Planned], most_bytes: int) -> list[list[Planned]]:
    """Tensors in their order, in files of at most `most_bytes` (a tensor that is larger has one to itself)."""
    files: list[list[Planned]] = [[]]
    room = most_bytes
    for tensor in tensors:
        if tensor.bytes > room and files[-1]:
            files.append([])
            room = most_bytes
        files[-1].append(tensor)
        room -= tensor.bytes
    return files


class StreamingFiles:
    """The files of one checkpoint in the making. `write` puts elements in their place; `finish` adds the index."""

    def __init__(self, directory: Path, tensors: Sequence[Planned], most_bytes: int) -> None:
        self.directory = directory
        self.total_bytes = sum(tensor.bytes for tensor in tensors)
        self._files: dict[str, list[Planned]] = {}
        self._place: dict[str, tuple[str, int, Planned]] = {}
        self._open: dict[str, int] = {}
        parts = shards(tensors, most_bytes)
        for number, part in enumerate(parts, 1):
            file = WEIGHTS_FILE if len(parts) == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
            # Wide elements first: then every tensor begins at a multiple of its elements' size.
            self._files[file] = sorted(part, key=lambda tensor: -tensor.dtype.itemsize)
            begin = len(self._header(file))
            for tensor in self._files[file]:
                self._place[tensor.name] = (file, begin, tensor)
                begin += tensor.bytes

    def _header(self, file: str) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for tensor in self._files[file]:
            offsets = [begin, begin + tensor.bytes]
            header[tensor.name] = {
                "dtype": NAME_OF[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": offsets,
            }
            begin += tensor.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            header = self._header(file)
            size = len(header) + sum(tensor.bytes for tensor in self._files[file])
            descriptor = os.open(self.directory / file, os.O_RDWR | os.O_CREAT, 0o644)
            self._open[file] = descriptor
            if os.fstat(descriptor).st_size != size:
                os.ftruncate(descriptor, 0)
                os.posix_fallocate(descriptor, 0, size)
                os.pwrite(descriptor, header, 0)
        return self._open[file]

    def write(self, name: str, first: int, data: Tensor) -> None:
        """Put elements at place `first` and after it, cast to the tensor's dtype."""
        file, begin, planned = self._place[name]
        descriptor = self._descriptor(file)
        raw = data.to(planned.dtype).contiguous().flatten().view(torch.uint8).numpy().data
        where = begin + first * planned.dtype.itemsize
        while raw:
            written = os.pwrite(descriptor, raw, where)
            raw, where = raw[written:], where + written

    def sync(self) -> None:
        """Everything written so far is on the disk after this; files are closed."""
        for descriptor in self._open.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._open.clear()

    def finish(self) -> None:
        """Make sure that every file exists, and write the index where there are several."""
        for file in self._files:
            self._descriptor(file)
        self.sync()
        if len(self._files) > 1:
            placed = {tensor.name: file for file, tensors in self._files.items() for tensor in tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(placed.items()))}
            write_atomically(self.directory / INDEX_FILE, json.dumps(index, indent=2) + "\n")
