"""A corpus on the disk: the ids of all documents one after the other, and where each begins.

    train.bin, validation.bin              ids, uint16 (or uint32 for a vocabulary over 65,536)
    train.offsets.npy, …                   int64 [documents + 1]: document d is ids[offsets[d] : offsets[d + 1]]
    manifest.json                          what is in it and where it came from

Every document begins with the begin token and ends with the end token. Both files are read as memory maps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import RequestError

MANIFEST_FILE = "manifest.json"


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class CorpusWriter:
    """Appends documents to one split. Used as a context manager; the offsets are written when it closes."""

    def __init__(self, directory: Path, split: str, dtype: np.dtype[Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._split, self._dtype = directory, split, dtype
        self._offsets = [0]
        self._digest = hashlib.sha256()

    def __enter__(self) -> CorpusWriter:
        self._file = (self._directory / f"{self._split}.bin").open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            np.save(self._directory / f"{self._split}.offsets.npy", np.asarray(self._offsets, dtype=np.int64))

    def append(self, ids: Sequence[int]) -> None:
        """One whole document, its begin and end tokens included."""
        data = np.asarray(ids, dtype=self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._offsets.append(self._offsets[-1] + len(ids))

    @property
    def tokens(self) -> int:
        return self._offsets[-1]

    @property
    def documents(self) -> int:
        return len(self._offsets) - 1

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


class Corpus:
    """One split of a corpus, read as memory maps."""

    def __init__(self, directory: Path, split: str) -> None:
        directory = Path(directory)
        self.manifest = read_manifest(directory)
        path = directory / f"{split}.bin"
        try:
            dtype = np.dtype(self.manifest["dtype"])
            self.offsets: np.ndarray = np.load(directory / f"{split}.offsets.npy", allow_pickle=False)
            size = path.stat().st_size // dtype.itemsize
            if size != int(self.offsets[-1]):
                raise RequestError(f"{path} holds {size} ids, its offsets say {self.offsets[-1]}; prepare it again.")
            self.ids: np.ndarray = np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)
        except (OSError, KeyError, ValueError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"{directory} holds no usable split '{split}' ({error}); prepare it again.") from error

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, document: int) -> np.ndarray:
        return self.ids[self.offsets[document] : self.offsets[document + 1]]


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a corpus."""
    path = Path(directory) / MANIFEST_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}); run the prepare stage to write it.") from error
