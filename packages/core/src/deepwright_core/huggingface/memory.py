"""Published checkpoints in memory: for models that fit, for notebooks and for comparing with other code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import RequestError
from ..model.config import ModelConfig
from ..model.directory import distinct_tensors
from ..model.tensor_files import differences
from ..model.transformer import Transformer, build_model
from ..registry import Registry, parse
from .fields import Fields
from .format import Format, format_for, format_of
from .piece import Shape


def shapes_of(registry: Registry, config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of a model's tensors, without memory for them."""
    with torch.device("meta"):
        model = build_model(registry, config)
    return {name: tuple(tensor.shape) for name, tensor in distinct_tensors(model).items()}


def read_config_document(
    document: Mapping[str, Any], registry: Registry, where: str
) -> tuple[Format, ModelConfig, list[str]]:
    """The format of a published config.json, our config for it, and the fields that had no effect."""
    format = format_of(document.get("model_type"), registry, where)
    fields = Fields(document, where)
    fields.value("model_type")
    values = format.read(fields)
    fields.done()
    return format, parse(ModelConfig, values, where, registry), fields.ignored()


def from_published(registry: Registry, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transformer:
    """A model from a config.json and tensors by the names they have on the disk (float32 parameters, training mode).

    Raises `RequestError` listing every field and tensor that does not fit.
    """
    format, ours, _ = read_config_document(config, registry, "config.json")
    model = build_model(registry, ours)
    own = distinct_tensors(model)
    pieces = format.pieces(ours, {name: tuple(tensor.shape) for name, tensor in own.items()})
    wanted = {piece.theirs: piece.shape for piece in pieces if not piece.optional or piece.theirs in tensors}
    problems = differences(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, "checkpoint")
    if problems:
        raise RequestError(problems)
    with torch.no_grad():
        for piece in pieces:
            if not piece.optional:
                own[piece.ours][piece.part].copy_(piece.to_ours(tensors[piece.theirs]))
    return model


def to_published(registry: Registry, model: Transformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors by the names they have on the disk. Raises `RequestError` when no format fits."""
    format = format_for(model.config, registry)
    own = {name: tensor.detach() for name, tensor in distinct_tensors(model).items()}
    tensors = {}
    for piece in format.pieces(model.config, {name: tuple(tensor.shape) for name, tensor in own.items()}):
        if piece.written:
            tensors[piece.theirs] = piece.to_theirs(own[piece.ours][piece.part]).clone().view(piece.shape)
    document = {"architectures": [format.architecture], "model_type": format.name}
    return document | format.write(model.config, registry), tensors
