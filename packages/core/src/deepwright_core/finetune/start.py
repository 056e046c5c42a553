"""The model directory that a stage starts from: one of ours, made by an import or by another stage.

Imported tokenizers may lack the marks of the chat form; they are added, and the model gets rows for them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import RequestError
from ..model.config import ModelConfig
from ..model.directory import CONFIG_FILE, distinct_tensors, load_model, read_config
from ..model.tensor_files import TensorFiles, differences
from ..model.transformer import Transformer, build_model
from ..model.vocabulary import grow_vocabulary
from ..registry import Registry
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Start:
    """A model with a tokenizer that knows the chat form.

    new_rows: how many of the last rows of its vocabulary were added. notes: what had to be added, in sentences.
    """

    model: Transformer
    tokenizer: Tokenizer
    new_rows: int = 0
    notes: tuple[str, ...] = ()


def load_start(
    directory: Path, registry: Registry, device: str | torch.device = "cpu", encoded_with: Tokenizer | None = None
) -> Start:
    """Load a model and its tokenizer, and make them fit for chat.

    encoded_with: the tokenizer whose ids the model will see. It must give every text the ids that the model knows.
    """
    given = Tokenizer.load(directory)
    if encoded_with is not None and not encoded_with.extends(given):
        raise RequestError(
            f"model.init: {directory} has another tokenizer than the one that the corpus was encoded with; "
            f"encode it with the model's own: tokenizer=file tokenizer.path={directory}."
        )
    tokenizer = encoded_with or given.with_chat_form()
    model = load_model(directory, registry, device)
    notes = []
    added = [tokenizer.spelling[mark] for mark in tokenizer.marks if mark not in given.marks]
    if added:
        notes.append(f"Added to the tokenizer: {', '.join(added)}.")
    new = grow_vocabulary(model, tokenizer.vocab_size)
    if new:
        rows = model.config.vocab_size
        notes.append(f"The vocabulary grew by {new} to {rows}: the new rows are the mean of the others.")
    return Start(model, tokenizer, new, tuple(notes))


def read_start(directory: Path, registry: Registry) -> ModelConfig:
    """The config of a directory that a stage may start from, without loading it: config, names and shapes of the
    weights, and the tokenizer are looked at. `RequestError` says everything that is wrong."""
    _refuse_published(directory)
    config = read_config(directory, registry)
    problems: list[str] = []
    try:
        stored = {name: tensor.shape for name, tensor in TensorFiles(directory).tensors.items()}
        with torch.device("meta"):
            model = build_model(registry, config)
        wanted = {name: tuple(tensor.shape) for name, tensor in distinct_tensors(model).items()}
        problems += differences(wanted, stored, str(directory))
    except RequestError as error:
        problems += error.problems
    try:
        Tokenizer.load(directory).with_chat_form()
    except RequestError as error:
        problems += error.problems
    if problems:
        raise RequestError(problems)
    return config


def _refuse_published(directory: Path) -> None:
    """A directory in somebody else's format can be had in ours; `read_config` could only say that it is not."""
    try:
        document = json.loads((directory / CONFIG_FILE).read_text())
        theirs = document["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if theirs != "deepwright":
        raise RequestError(
            f"{directory} holds a model in the Hugging Face format (model_type {theirs!r}); import it first, with "
            f"`deepwright convert import {directory} <directory>`, and start from that directory."
        )
