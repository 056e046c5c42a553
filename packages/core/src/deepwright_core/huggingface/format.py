"""What a published format is, and how one is found for a config.

A format translates configs in both directions and says which of its tensors is which of ours. Formats are registered
like every other component, so that a plugin with an attention of its own can bring the format of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ..errors import RequestError
from ..model.config import ModelConfig
from ..registry import ComponentConfig, Registry
from .fields import Fields
from .piece import Piece, Shape

KIND = "checkpoint_format"


class FormatConfig(ComponentConfig):
    """A published format has no options."""


class Format(Protocol):
    """A published format.

    name: its `model_type` when written. model_types: those it reads. architecture: the class that others load.
    read: the fields of a config.json to our config as plain data; problems are left in `fields`.
    refusals: why a model cannot be written in this format, a sentence each.
    write: our config to the fields of a config.json, less what every format has.
    pieces: which of their tensors is which of ours, for a model whose tensors have these shapes.
    caveats: what some readers of the format do not do with a model that can be written, or with its tokenizer.json
    ({} when there is none), a sentence each.
    mtp_prefixes: beginnings of the names of the tensors of multi-token prediction, in a model with this many layers.
    """

    name: str
    model_types: tuple[str, ...]
    architecture: str

    def read(self, fields: Fields) -> dict[str, Any]: ...

    def refusals(self, config: ModelConfig, registry: Registry) -> list[str]: ...

    def write(self, config: ModelConfig, registry: Registry) -> dict[str, Any]: ...

    def caveats(self, config: ModelConfig, registry: Registry, tokenizer: Mapping[str, Any]) -> list[str]: ...

    def pieces(self, config: ModelConfig, shapes: Mapping[str, Shape]) -> list[Piece]: ...

    def mtp_prefixes(self, layers: int, depth: int) -> tuple[str, ...]: ...


def formats(registry: Registry) -> list[Format]:
    """Every registered format."""
    return [registry.build(KIND, {"name": name}) for name in registry.names(KIND)]


def format_of(model_type: Any, registry: Registry, where: str) -> Format:
    """The format that reads a model_type; `RequestError` when there is none."""
    for candidate in formats(registry):
        if model_type in candidate.model_types:
            return candidate
    known = sorted(model_type for candidate in formats(registry) for model_type in candidate.model_types)
    raise RequestError(f"{where}: model_type is {model_type!r}; expected one of {', '.join(known)}.")


def format_for(config: ModelConfig, registry: Registry) -> Format:
    """The format that a model can be written in; `RequestError` with every format's reasons when there is none."""
    reasons: list[str] = []
    for candidate in formats(registry):
        refusals = candidate.refusals(config, registry)
        if not refusals:
            return candidate
        reasons.append(f"Not as {candidate.name}: {'; '.join(refusals)}.")
    raise RequestError(["No published format can hold this model.", *reasons])
