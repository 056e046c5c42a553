"""Model directories: what is written comes back exactly, and what does not fit is refused in sentences."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import find_model, load_model, load_weights, read_config, save_model
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry, parse


def build(registry: Registry, seed: int = 0, **changes: Any) -> Transformer:
    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 8, "layers": 2, "intermediate_size": 12}
    attention = {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4}
    values = {**sizes, "attention": attention, "ffn": {"name": "dense"}, **changes}
    config = parse(ModelConfig, values, "model", registry)
    return build_model(registry, config, seed)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_config_come_back(registry: Registry, tmp_path: Path, tied: bool) -> None:
    rope = {"theta": 500.0, "yarn": {"factor": 4, "original_positions": 64}}
    model = build(registry, tied_head=tied, rope=rope, mtp={"depth": 1}, norm_eps=1e-5)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", registry)
    assert loaded.config == model.config and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    tokens = torch.randint(20, (2, 5))
    assert torch.equal(loaded(tokens), model(tokens))


def test_only_the_two_files_are_left(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry), tmp_path)
    save_model(build(registry, seed=1), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_model(tmp_path, registry).norm.weight, torch.ones(8))


def test_a_tied_head_is_written_once(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry, tied_head=True), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "head.weight" not in file.keys() and "embedding.weight" in file.keys()  # noqa: SIM118


def test_the_config_says_every_value_that_was_used(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry), tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["model_type"] == "deepwright"
    assert document["rope"] == {"theta": 10000.0, "yarn": None, "llama3": None}
    assert document["ffn"] == {"name": "dense", "intermediate_size": 0}
    assert read_config(tmp_path, registry).attention == document["attention"]
    assert document["attention"] == {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4, "qkv_bias": False}


def test_casting_leaves_buffers_in_float32(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry), tmp_path)
    model = load_model(tmp_path, registry, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(registry: Registry, tmp_path: Path) -> None:
    model = build(registry)
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    stored["stranger.weight"] = stored.pop("layers.1.ffn.up.weight")
    stored["norm.weight"] = torch.full((9,), 2.0)
    stored["head.weight"] = torch.zeros(20, 8)
    save_file(stored, path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RequestError) as caught:
        load_weights(model, path)
    assert caught.value.problems == [
        f"{path}: 'layers.1.ffn.up.weight' is missing.",
        f"{path}: 'stranger.weight' belongs to no parameter of the model.",
        f"{path}: 'norm.weight' has shape [9]; the model wants [8].",
    ]
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def write(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "{directory} is not a model directory: it has no config.json."),
        ("{", "{path} is not valid JSON: Expecting property name"),
        ("[]", "{path} holds a list; expected a mapping with a model's config."),
        ('{"model_type": "llama"}', "{path}: model_type is 'llama'; expected 'deepwright'."),
        ("{}", "{path}: model_type is None; expected 'deepwright'."),
    ],
)
def test_what_is_no_config_is_refused(registry: Registry, tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        write(tmp_path, text)
    with pytest.raises(RequestError) as caught:
        read_config(tmp_path, registry)
    assert str(caught.value).startswith(sentence.format(directory=tmp_path, path=tmp_path / "config.json"))


def test_unknown_keys_and_components_are_refused_all_at_once(registry: Registry, tmp_path: Path) -> None:
    save_model(build(registry), tmp_path)
    path = tmp_path / "config.json"
    document = json.loads(path.read_text())
    document["auto_map"] = {"AutoModel": "evil.Model"}
    document["attention"]["name"] = "gqqa"
    document["ffn"]["widht"] = 3
    write(tmp_path, json.dumps(document))
    with pytest.raises(RequestError) as caught:
        load_model(tmp_path, registry)
    assert [problem.split(" ")[0] for problem in caught.value.problems] == [
        f"{path}.attention.name:",
        f"{path}.ffn.widht",
        f"{path}.auto_map",
    ]


class Bomb:
    """Says so when it is unpickled."""

    exploded = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (Bomb, "exploded", True)


@pytest.mark.parametrize("damage", ["missing", "cut", "pickle"])
def test_weights_that_cannot_be_read_are_refused_and_run_nothing(
    registry: Registry, tmp_path: Path, damage: str
) -> None:
    save_model(build(registry), tmp_path)
    path = tmp_path / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        RequestError, match=f"{tmp_path} has no weights" if damage == "missing" else f"{path} cannot be read"
    ):
        load_model(tmp_path, registry)
    assert not Bomb.exploded


def test_a_model_is_found_by_its_directory_or_its_stage(registry: Registry, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    save_model(build(registry), stage / "model")
    assert find_model(stage / "model") == find_model(stage) == stage / "model"
    (stage / "model").rename(stage / "student")
    with pytest.raises(RequestError, match="holds no model"):
        find_model(stage)
    (stage / "result.json").write_text(json.dumps({"outputs": {"samples": "s.jsonl", "student_model": "student"}}))
    assert find_model(stage) == stage / "student"
    (stage / "result.json").write_text("[]")
    with pytest.raises(RequestError, match=r"result\.json is not"):
        find_model(stage)
    with pytest.raises(RequestError, match="does not exist"):
        find_model(tmp_path / "nowhere")


def test_weights_in_several_files_are_read_by_their_index(registry: Registry, tmp_path: Path) -> None:
    model = build(registry, mtp={"depth": 1})
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    placed = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(sorted(stored))}
    for file in set(placed.values()):
        save_file({name: stored[name] for name, where in placed.items() if where == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    loaded = load_model(tmp_path, registry)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
