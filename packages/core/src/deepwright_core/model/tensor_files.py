"""The tensors of a directory: one `model.safetensors`, or several such files and the index that says which holds what.

Reading is lazy: a tensor, or some of its rows, comes from the disk when it is asked for. Nothing is executed, and a
name in the index can only mean a file of the directory itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import RequestError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# A file is mapped into memory as it is read; after this much it is let go and opened again.
MAPPED_BYTES = 2**28
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
NAME_OF = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies. `dtype` is the file format's name for it (a key of DTYPES where torch has it)."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else 1
        return math.prod(self.shape) * size


class TensorFiles:
    """The tensors of a directory by name. Raises `RequestError` with every problem found when it is opened.

    ignore: ends of names that are passed over (values that every reader computes for itself).
    """

    def __init__(self, directory: Path, ignore: tuple[str, ...] = ()) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        self._open: tuple[str, Any] | None = None
        self._mapped = 0
        placed = _index(directory)
        problems: list[str] = []
        for file in sorted(set(placed.values())) if placed is not None else [WEIGHTS_FILE]:
            try:
                found = self._describe(file)
            except RequestError as error:
                problems += error.problems
                continue
            if placed is not None:
                listed = {name for name, where in placed.items() if where == file}
                problems += [
                    f"{directory / INDEX_FILE} says that '{name}' is in {file}, which does not hold it."
                    for name in sorted(listed - found.keys())
                ]
                problems += [
                    f"{directory / file} holds '{name}', which {INDEX_FILE} does not place there."
                    for name in sorted(found.keys() - listed)
                ]
            self.tensors |= {name: tensor for name, tensor in found.items() if not name.endswith(ignore)}
        if problems:
            raise RequestError(problems)

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors."""
        return [self.directory / file for file in sorted({tensor.file for tensor in self.tensors.values()})]

    def read(self, name: str, part: tuple[int | slice, ...] = ()) -> Tensor:
        """A tensor, or the part of it that an index of its first dimensions picks out."""
        stored = self.tensors[name]
        try:
            handle = self._handle(stored.file)
            tensor: Tensor = handle.get_slice(name)[part] if part else handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{self.directory / stored.file}: '{name}' cannot be read: {error}.") from None
        self._mapped += tensor.nbytes
        return tensor

    def read_whole(self) -> dict[str, Tensor]:
        """Every tensor, file by file."""
        return {name: self.read(name) for name in sorted(self.tensors, key=lambda n: (self.tensors[n].file, n))}

    def close(self) -> None:
        """Let go of the file at hand (its pages are mapped into memory)."""
        self._open = None
        self._mapped = 0

    def _handle(self, file: str) -> Any:
        if self._open is None or self._open[0] != file or self._mapped > MAPPED_BYTES:
            self.close()
            self._open = (file, safe_open(self.directory / file, "pt"))
        return self._open[1]

    def _describe(self, file: str) -> dict[str, StoredTensor]:
        path = self.directory / file
        if not path.is_file():
            raise RequestError(f"{path} does not exist.")
        try:
            with safe_open(path, "pt") as handle:
                return {
                    name: StoredTensor(
                        file, handle.get_slice(name).get_dtype(), tuple(handle.get_slice(name).get_shape())
                    )
                    for name in handle.keys()  # noqa: SIM118 (a handle is no mapping)
                }
        except (OSError, SafetensorError) as error:
            raise RequestError(f"{path} cannot be read as safetensors (is it truncated?): {error}.") from None


def _index(directory: Path) -> dict[str, str] | None:
    """Name of tensor -> name of file; None when everything is in one file."""
    path = directory / INDEX_FILE
    if not path.is_file():
        if (directory / WEIGHTS_FILE).is_file():
            return None
        if any((directory / name).exists() for name in PICKLES):
            raise RequestError(
                f"{directory} holds pickled weights ({PICKLES[0]}), which can run code when they are read; "
                "convert them to safetensors first."
            )
        if list(directory.glob("*.safetensors")):
            raise RequestError(f"{path} is missing; without it nobody knows which of the weights' files belong here.")
        raise RequestError(f"{directory} has no weights: expected {WEIGHTS_FILE}, or {INDEX_FILE} and its files.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not valid JSON: {error}.") from None
    placed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise RequestError(f"{path} has no weight_map; expected one that names the file of each tensor.")
    outside = sorted({file for file in placed.values() if Path(file).name != file or not file.endswith(".safetensors")})
    if outside:
        raise RequestError(
            [
                f"{path} names the file {file!r}; expected the plain name of a .safetensors file in the same directory."
                for file in outside
            ]
        )
    return dict(placed)


def differences(wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], where: str) -> list[str]:
    """What keeps two sets of tensors from matching one to one, a sentence each."""
    problems = [f"{where}: '{name}' is missing." for name in sorted(wanted.keys() - stored.keys())]
    problems += [
        f"{where}: '{name}' belongs to no parameter of the model." for name in sorted(stored.keys() - wanted.keys())
    ]
    problems += [
        f"{where}: '{name}' has shape {list(stored[name])}; the model wants {list(wanted[name])}."
        for name in sorted(wanted.keys() & stored.keys())
        if tuple(stored[name]) != tuple(wanted[name])
    ]
    return problems
