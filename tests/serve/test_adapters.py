"""Adapters as models of their own names, over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core import plugins
from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.finetune import adapter_files
from deepwright_core.finetune.lora import Lora, LoraConfig
from deepwright_core.model.directory import load_model
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.engine_options import named_adapters
from deepwright_serve.limits import Limits
from deepwright_serve.loading import Loading
from deepwright_serve.roster import Roster
from deepwright_serve.service import Service


@pytest.fixture
def adapter(model_directory: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A stage's directory with an adapter in it, and the merged model."""
    model = load_model(model_directory, plugins.installed().registry)
    config = LoraConfig(rank=2, alpha=8.0, targets=["attention", "ffn"])
    lora = Lora(config, model, seed=0)
    generator = torch.Generator().manual_seed(1)
    for tensor in lora.factors().values():
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    adapter_files.write(tmp_path / "run" / "adapter", config, lora.originals(), lora.factors())
    lora.merge()
    return tmp_path / "run", model


@pytest.mark.parametrize("replicas", [1, 2])
def test_an_adapter_is_a_model_of_its_own_name(
    model_directory: Path,
    adapter: tuple[Path, Any],
    tokenizer: Tokenizer,
    serve_service: Callable[[Service], Any],
    replicas: int,
) -> None:
    path, merged = adapter
    loading = Loading(device="cpu", cache_tokens=512, limits=Limits(), replicas=replicas)
    models = loading.load_with_adapters(model_directory, "tiny", "", {"poet": path})
    assert [(served.name, served.adapter) for served in models] == [("tiny", ""), ("poet", "poet")]
    assert models[0].thread is models[1].thread
    base = load_model(model_directory, plugins.installed().registry)
    prompt = tokenizer.encode("What is 17")
    with serve_service(Service(Roster(models), Limits())) as server:
        cards = server.client.get("/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["tiny", "poet"]
        assert [(card["root"], card["parent"]) for card in cards] == [("tiny", None), ("poet", "tiny")]
        for _ in range(2):
            for name, model in (("tiny", base), ("poet", merged)):
                body = {"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}
                reply = server.client.post("/v1/completions", json=body).json()
                params = SamplingParams(max_tokens=8, temperature=0)
                (want,) = Engine(model, tokenizer.end_ids, cache_tokens=512).generate([prompt], params)
                assert reply["choices"][0]["text"] == tokenizer.decode(want.token_ids)
                assert reply["model"] == name
        server.client.get("/health").raise_for_status()


def test_an_adapter_of_another_model_is_refused_before_anything_is_served(
    model_directory: Path, adapter: tuple[Path, Any]
) -> None:
    path, _ = adapter
    document = path / "adapter" / adapter_files.CONFIG_FILE
    document.write_text(document.read_text().replace('"adapted": "', '"adapted": "0'))
    with pytest.raises(RequestError, match="was trained on other weights than"):
        Loading(device="cpu", cache_tokens=512).load_with_adapters(model_directory, "tiny", "", {"poet": path})


def test_names_of_adapters() -> None:
    assert named_adapters(["a=x", "b/c=y=z"], "tiny") == {"a": "x", "b/c": "y=z"}
    with pytest.raises(RequestError) as refused:
        named_adapters(["a", "=x", "a=", "tiny=x", "b=x", "b=y"], "tiny")
    assert len(refused.value.problems) == 5
    assert "'tiny' is the name of the model itself" in refused.value.problems[3]
    assert "'b' is the name of the adapter in x" in refused.value.problems[4]
