"""A dataset of the Hugging Face hub, through the `datasets` library, which is only imported here.

Streams by default: only what `max_bytes` allows is downloaded. Datasets that need their own code run are refused by
the library itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from ..errors import RequestError, WorkError
from ..registry import ComponentConfig
from .document import Document, Dropped, TextSplit
from .files import bounded


class HubConfig(ComponentConfig):
    """A dataset of the Hugging Face hub, or anything else that `datasets.load_dataset` can name.

    dataset, subset, revision: which one. split: its split to read. field: the column that holds the text.
    validation_split: its split for validation; without it, documents are split by the hash of their text.
    streaming: read while downloading, instead of downloading everything first.
    """

    name: Literal["hub"] = "hub"
    dataset: str
    subset: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | None = None
    field: str = "text"
    streaming: bool = True
    validation_share: float = Field(0.05, gt=0, lt=1)
    max_bytes: int | None = Field(100_000_000, ge=1)


def read(config: HubConfig) -> Iterator[Document | Dropped]:
    """A dataset of the Hugging Face hub, streamed through the `datasets` library."""
    return bounded(_rows(config), config.validation_share, config.max_bytes)


def _rows(config: HubConfig) -> Iterator[tuple[str, str, TextSplit | None]]:
    try:
        import datasets
    except ImportError as error:
        raise RequestError(
            "data=hub needs the datasets library, which is not installed; pip install 'deepwright-core[hub]'."
        ) from error
    wanted: list[tuple[str, TextSplit | None]] = [(config.split, None)]
    if config.validation_split is not None:
        # Validation first: a bound on the bytes must not leave it empty.
        wanted = [(config.validation_split, "validation"), (config.split, "train")]
    for name, split in wanted:
        source = f"{config.dataset}/{config.subset or 'default'}/{name}"
        try:
            rows: Any = datasets.load_dataset(
                config.dataset, config.subset, split=name, revision=config.revision, streaming=config.streaming
            )
            yield from ((_text(row, config.field, source), source, split) for row in rows)
        except RequestError:
            raise
        except (ValueError, FileNotFoundError) as error:
            raise RequestError(f"data: {source} cannot be loaded ({error}).") from error
        except Exception as error:  # networks and files fail in many ways
            raise WorkError(f"data: reading {source} failed ({type(error).__name__}: {error}).") from error


def _text(row: dict[str, Any], field: str, source: str) -> str:
    if field not in row:
        raise RequestError(f"data: {source} has no column '{field}' (columns: {', '.join(row)}); set data.field.")
    value = row[field]
    if not isinstance(value, str | None):
        raise RequestError(f"data: {source} column '{field}' is {type(value).__name__}; expected text.")
    return value or ""
