"""An adapter and its base are the merged model, bit for bit; with anything else they are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepwright_core.errors import RequestError
from deepwright_core.finetune.apply_adapter import apply_adapter
from deepwright_core.finetune.lora import Lora, LoraConfig
from deepwright_core.finetune.start import load_start
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import Transformer
from deepwright_core.registry import Registry
from deepwright_core.tokenizer import Tokenizer

Build = Callable[..., Transformer]


@pytest.fixture
def finished(base: Path, registry: Registry, tmp_path: Path) -> Path:
    return finish(base, registry, tmp_path)


def finish(base: Path, registry: Registry, tmp_path: Path) -> Path:
    """What a stage leaves: model/ and adapter/."""
    start = load_start(base, registry)
    config = LoraConfig(rank=3, targets=["attention", "ffn.experts", "head"])
    lora = Lora(config, start.model, seed=1, new_rows=start.new_rows)
    generator = torch.Generator().manual_seed(2)
    for tensor in lora.factors().values():
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.1
    assert lora.finish(tmp_path / "stage") == {"adapter": "adapter"}
    save_model(start.model, tmp_path / "stage" / "model")
    start.tokenizer.save(tmp_path / "stage" / "model")
    return tmp_path / "stage"


@pytest.mark.parametrize("kind", ["base", "bare"])
def test_base_and_adapter_are_the_merged_model(
    request: pytest.FixtureRequest, kind: str, registry: Registry, tmp_path: Path
) -> None:
    """Also where the stage had to add tokens to the base."""
    base = request.getfixturevalue(kind)
    finished = finish(base, registry, tmp_path)
    apply_adapter(base, finished / "adapter", tmp_path / "again", registry)
    files = sorted(path.name for path in (finished / "model").iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == files
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (finished / "model" / name).read_bytes(), name
    assert (finished / "model" / "model.safetensors").read_bytes() != (base / "model.safetensors").read_bytes()
    load_model(tmp_path / "again", registry)


def test_an_adapter_is_small_and_says_what_it_is(base: Path, finished: Path) -> None:
    adapter = finished / "adapter"
    assert sorted(path.name for path in adapter.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert (adapter / "adapter.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    section = json.loads((adapter / "adapter_config.json").read_text())["finetune"]
    assert section == {"name": "lora", "rank": 3, "alpha": 16.0, "targets": ["attention", "ffn.experts", "head"]}


def test_other_weights_of_the_same_shape_are_refused(
    base: Path, finished: Path, build: Build, tokenizer: Tokenizer, registry: Registry, tmp_path: Path
) -> None:
    other = build(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        other.layers[1].attention.k.weight[0, 0] += 1e-6
    save_model(other, tmp_path / "other")
    tokenizer.save(tmp_path / "other")
    with pytest.raises(RequestError, match=r"adapter was trained on other weights than .*other holds"):
        apply_adapter(tmp_path / "other", finished / "adapter", tmp_path / "again", registry)
    assert not (tmp_path / "again").exists()


def test_a_model_of_another_shape_is_refused(
    finished: Path, build: Build, tokenizer: Tokenizer, registry: Registry, tmp_path: Path
) -> None:
    save_model(build(vocab_size=tokenizer.vocab_size, layers=1, mtp={"depth": 0}), tmp_path / "other")
    tokenizer.save(tmp_path / "other")
    with pytest.raises(RequestError, match=r"'ffn.experts', and no matrix of the model is called so"):
        apply_adapter(tmp_path / "other", finished / "adapter", tmp_path / "again", registry)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("adapter_config.json", None, "has no adapter_config.json"),
        ("adapter_config.json", "{", "cannot be read as an adapter"),
        ("adapter_config.json", '{"format": 2}', "is of format 2; expected 1"),
        ("adapter_config.json", '{"format": 1}', "cannot be read as an adapter: KeyError"),
        ("adapter.safetensors", None, "has no adapter.safetensors"),
        ("adapter.safetensors", "nothing", "cannot be read as an adapter"),
    ],
)
def test_a_broken_adapter_is_a_sentence(
    base: Path, finished: Path, registry: Registry, tmp_path: Path, name: str, content: str | None, says: str
) -> None:
    path = finished / "adapter" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(RequestError, match=says):
        apply_adapter(base, finished / "adapter", tmp_path / "again", registry)
