"""The model that a stage starts from: read before anything is loaded, loaded fit for chat, refused in sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepwright_core.errors import RequestError
from deepwright_core.finetune.start import load_start, read_start
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import Transformer
from deepwright_core.registry import Registry
from deepwright_core.tokenizer import Tokenizer

Build = Callable[..., Transformer]


def test_a_good_directory_is_its_config(base: Path, registry: Registry) -> None:
    assert read_start(base, registry) == load_model(base, registry).config


def test_a_start_is_the_model_as_it_lies_there(base: Path, registry: Registry, tokenizer: Tokenizer) -> None:
    start, model = load_start(base, registry), load_model(base, registry)
    assert start.notes == () and start.tokenizer.vocab_size == tokenizer.vocab_size
    assert all(torch.equal(start.model.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_beyond_the_models_rows_get_rows(
    build: Build, tokenizer: Tokenizer, registry: Registry, tmp_path: Path, tied: bool
) -> None:
    save_model(build(vocab_size=tokenizer.vocab_size - 4, tied_head=tied), tmp_path)
    tokenizer.save(tmp_path)
    start = load_start(tmp_path, registry)
    assert start.model.config.vocab_size == len(start.model.embedding.weight) == tokenizer.vocab_size
    (note,) = start.notes
    assert f"vocabulary grew by 4 to {tokenizer.vocab_size}" in note
    again = load_start(tmp_path, registry).model  # a resumed stage, or the reference policy
    assert torch.equal(again.embedding.weight, start.model.embedding.weight)
    assert torch.equal(again.head.weight, start.model.head.weight)


def test_marks_of_the_chat_form_are_added_behind_what_is_there(bare: Path, registry: Registry, tmp_path: Path) -> None:
    given, rows = Tokenizer.load(bare), load_model(bare, registry).config.vocab_size
    assert not given.chats and read_start(bare, registry).vocab_size == rows == given.vocab_size
    start = load_start(bare, registry)
    assert start.tokenizer.chats and start.tokenizer.extends(given)
    assert start.model.config.vocab_size == start.tokenizer.vocab_size > rows
    assert start.tokenizer.spelling["eos"] == "</s>"  # its own, not ours
    added, grew = start.notes
    assert "<｜User｜>" in added and "</s>" not in added and f"to {start.tokenizer.vocab_size}" in grew
    ids = start.tokenizer.chat([{"role": "user", "content": "fox"}])
    with torch.no_grad():
        assert start.model.logits(start.model(torch.tensor([ids]))).isfinite().all()
    save_model(start.model, tmp_path / "next")
    start.tokenizer.save(tmp_path / "next")
    assert load_start(tmp_path / "next", registry).notes == ()


def test_more_rows_than_tokens_stay(build: Build, tokenizer: Tokenizer, registry: Registry, tmp_path: Path) -> None:
    """Published models are padded to a round number."""
    save_model(build(vocab_size=tokenizer.vocab_size + 5), tmp_path)
    tokenizer.save(tmp_path)
    start = load_start(tmp_path, registry)
    assert start.model.config.vocab_size == tokenizer.vocab_size + 5 and start.notes == ()


def test_a_corpus_in_other_ids_is_refused(base: Path, registry: Registry, tokenizer: Tokenizer) -> None:
    other = registry.build(
        "tokenizer", {"name": "bpe", "vocab_size": 290}, ["quite another text, with other merges"] * 9
    )
    with pytest.raises(RequestError, match=rf"another tokenizer .* tokenizer=file tokenizer.path={base}"):
        load_start(base, registry, encoded_with=other)
    same = registry.build("tokenizer", {"name": "file", "path": str(base)}, [])
    assert load_start(base, registry, encoded_with=same).tokenizer is same


def edit_config(base: Path, **changes: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_a_tensor(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, base / "model.safetensors")


def truncate(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda base: (base / "config.json").unlink(), ["is not a model directory: it has no config.json"]),
        (lambda base: (base / "config.json").write_text("{"), ["config.json is not valid JSON"]),
        (
            lambda base: edit_config(base, model_type="deepseek_v3"),
            ["in the Hugging Face format (model_type 'deepseek_v3'); import it first, with `deepwright convert"],
        ),
        (lambda base: edit_config(base, hidden_size="wide", colour=1), ["hidden_size is 'wide'", "colour is not an"]),
        (lambda base: edit_config(base, layers=1), ["'layers.1.attention_norm.weight' belongs to no parameter"]),
        (lambda base: (base / "model.safetensors").unlink(), ["has no weights"]),
        (truncate, ["is it truncated?"]),
        (drop_a_tensor, ["'norm.weight' is missing"]),
        (lambda base: (base / "tokenizer.json").unlink(), ["tokenizer.json does not exist"]),
        (
            lambda base: [truncate(base), (base / "tokenizer.json").write_text("{}")],
            ["is it truncated?", "tokenizer.json is not a tokenizer"],
        ),
    ],
)
def test_a_bad_directory_is_refused_with_all_that_is_wrong(
    base: Path, registry: Registry, harm: Callable[[Path], Any], says: list[str]
) -> None:
    harm(base)
    with pytest.raises(RequestError) as error:
        read_start(base, registry)
    for part in says:
        assert any(part in problem for problem in error.value.problems), error.value.problems
