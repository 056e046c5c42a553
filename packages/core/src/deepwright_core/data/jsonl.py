"""JSON lines: one object a line, the text in one of its fields. A line that is not so is refused, not skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from ..errors import RequestError
from .document import Document, Dropped, TextSplit
from .files import FilesConfig, bounded, paths_of


class JsonlConfig(FilesConfig):
    """JSON lines, by path or glob.

    field: the key that holds the text.
    """

    name: Literal["jsonl"] = "jsonl"
    field: str = "text"


def read(config: JsonlConfig) -> Iterator[Document | Dropped]:
    """JSON lines: one document a line, its text in the field `data.field`."""
    return bounded(_lines(config), config.validation_share, config.max_bytes)


def _lines(config: JsonlConfig) -> Iterator[tuple[str, str, TextSplit | None]]:
    for path, split in paths_of(config, (".jsonl", ".ndjson")):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _text(line, config.field, f"data: {path} line {number}"), str(path), split


def _text(line: bytes, field: str, where: str) -> str:
    fix = "mend or remove the line."
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"{where} is not UTF-8 (byte {error.start}); {fix}") from error
    except ValueError as error:
        raise RequestError(f"{where} is not valid JSON ({error}); {fix}") from error
    except RecursionError as error:
        raise RequestError(f"{where} is nested too deeply; {fix}") from error
    if not isinstance(record, dict):
        raise RequestError(f"{where} holds {type(record).__name__}; expected an object with '{field}'; {fix}")
    if field not in record:
        known = ", ".join(map(str, record)) or "none"
        raise RequestError(f"{where} has no field '{field}' (fields: {known}); set data.field, or {fix}")
    if not isinstance(record[field], str):
        raise RequestError(f"{where} field '{field}' is {type(record[field]).__name__}; expected text; {fix}")
    return record[field]
