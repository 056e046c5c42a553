"""Parquet files: one document a row, read in batches through pyarrow, which is only imported here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..errors import RequestError
from .document import Document, Dropped, TextSplit
from .files import FilesConfig, bounded, paths_of


class ParquetConfig(FilesConfig):
    """Parquet files, by path or glob.

    field: the column that holds the text.
    """

    name: Literal["parquet"] = "parquet"
    field: str = "text"


def read(config: ParquetConfig) -> Iterator[Document | Dropped]:
    """Parquet: one document a row, its text in the column `data.field`."""
    return bounded(_rows(config), config.validation_share, config.max_bytes)


def _rows(config: ParquetConfig) -> Iterator[tuple[str, str, TextSplit | None]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise RequestError(
            "data=parquet needs pyarrow, which is not installed; pip install 'deepwright-core[parquet]'."
        ) from error
    for path, split in paths_of(config, (".parquet",)):
        try:
            file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise RequestError(f"data: {path} is not a Parquet file that can be read ({error}).") from error
        with file:
            columns = file.schema_arrow.names
            if config.field not in columns:
                raise RequestError(
                    f"data: {path} has no column '{config.field}' (columns: {', '.join(columns)}); set data.field."
                )
            row = 0
            for batch in file.iter_batches(columns=[config.field], batch_size=1024):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str | None):
                        raise RequestError(
                            f"data: {path} row {row} column '{config.field}' is {type(value).__name__}; expected text."
                        )
                    row += 1
                    yield value or "", str(path), split
