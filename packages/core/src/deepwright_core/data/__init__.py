"""Text: where it comes from, how it is cleaned and recorded, how it is stored as ids and dealt out in batches."""

from __future__ import annotations

from ..registry import Registry
from . import hub, jsonl, parquet, stdlib, text
from .document import Document, Dropped
from .packing import PackedBatches

__all__ = ["Document", "Dropped", "PackedBatches", "register"]


def register(registry: Registry) -> None:
    """Add the sources `stdlib`, `text`, `jsonl`, `parquet` and `hub`."""
    registry.add("source", "stdlib", config=stdlib.StdlibConfig)(stdlib.read)
    registry.add("source", "text", config=text.TextConfig)(text.read)
    registry.add("source", "jsonl", config=jsonl.JsonlConfig)(jsonl.read)
    registry.add("source", "parquet", config=parquet.ParquetConfig)(parquet.read)
    registry.add("source", "hub", config=hub.HubConfig)(hub.read)
