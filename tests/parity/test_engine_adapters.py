"""Many adapters on one engine, on a whole DeepSeek-shaped model: each answers as its merged model does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.finetune import adapter_files
from deepwright_core.finetune.lora import Lora, LoraConfig
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import Plugins, installed
from deepwright_core.registry import parse

VALUES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "layers": 2,
    "intermediate_size": 24,
    "first_dense_layers": 1,
    "max_positions": 64,
    "init_std": 0.25,
    "mtp": {"depth": 1},
    "attention": {
        "name": "mla",
        "heads": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 4,
    },
    "ffn": {"name": "moe", "experts": 4, "top_k": 2, "intermediate_size": 8, "router": {"name": "noaux_tc"}},
}
# One of the usual kind, and one of another rank that leaves no matrix as it is, the router's and the embedding's
# included.
ADAPTERS = {
    "one": LoraConfig(rank=2, alpha=6.0),
    "two": LoraConfig(rank=3, alpha=3.0, targets=["attention", "ffn", "embedding", "head", "projection"]),
}
NAMES = ["", *ADAPTERS]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = [[1 + (7 * i + j * j) % 38 for j in range(length)] for i, length in enumerate((3, 17, 9, 17))]


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return installed()


@pytest.fixture(scope="module")
def base(plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters") / "base"
    save_model(build_model(plugins.registry, parse(ModelConfig, VALUES, "model", plugins.registry), seed=0), directory)
    return directory


@pytest.fixture(scope="module")
def merged(plugins: Plugins, base: Path) -> dict[str, Transformer]:
    """The merged model of each adapter, which is written beside the base."""
    models = {"": load_model(base, plugins.registry)}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        models[name] = load_model(base, plugins.registry)
        lora = Lora(config, models[name], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for tensor in lora.factors().values():
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.25
        adapter_files.write(base.parent / name, config, lora.originals(), lora.factors())
        lora.merge()
    return models


@pytest.fixture
def engine(plugins: Plugins, base: Path, merged: dict[str, Transformer]) -> Iterator[Engine]:
    engine = Engine(load_model(base, plugins.registry), 0, block_size=4, cache_tokens=512)
    for name in ADAPTERS:
        engine.load_adapter(name, base.parent / name)
    yield engine


def finish(engine: Engine, wanted: dict[int, Any]) -> dict[Any, list[int]]:
    tokens: dict[Any, list[int]] = {key: [] for key in wanted.values()}
    while engine.has_work:
        for event in engine.step():
            assert event.token_id is not None
            tokens[wanted[event.request_id]].append(event.token_id)
    return tokens


@pytest.fixture(scope="module")
def answers(merged: dict[str, Transformer]) -> dict[Any, list[int]]:
    """What the merged models say to each prompt, one at a time."""
    found = {}
    for name, model in merged.items():
        engine = Engine(model, 0, block_size=4, cache_tokens=256)
        for number, prompt in enumerate(PROMPTS):
            found[name, number] = engine.generate([prompt], GREEDY)[0].token_ids
    assert len({tuple(found[name, 1]) for name in NAMES}) == 3  # or this would show nothing
    return found


@pytest.mark.parametrize("shape", [{}, {"max_prefill_tokens": 5, "max_batch": 5}, {"speculate": 2}])
def test_a_mixed_batch_answers_as_the_merged_models_do(
    plugins: Plugins, base: Path, answers: dict[Any, list[int]], shape: dict[str, int]
) -> None:
    engine = Engine(load_model(base, plugins.registry), 0, block_size=4, cache_tokens=512, **shape)
    for name in ADAPTERS:
        engine.load_adapter(name, base.parent / name)
    for _ in range(2):  # the second time from the prefix cache
        wanted = {
            engine.add(prompt, GREEDY, adapter=name): (name, number)
            for number, prompt in enumerate(PROMPTS)
            for name in NAMES
        }
        assert finish(engine, wanted) == answers
    assert engine.stats.cached_prompt_tokens > 0 and engine.stats.cache_blocks_used == 0


def test_probabilities_are_those_of_the_merged_model(engine: Engine, merged: dict[str, Transformer]) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.7, ignore_eos=True)
    for name, model in merged.items():
        (completion,) = engine.generate([PROMPTS[1]], params, adapter=name)
        tokens = torch.tensor([PROMPTS[1] + completion.token_ids])
        with torch.no_grad():
            logits = model.logits(model(tokens)[0, len(PROMPTS[1]) - 1 : -1]) / 0.7
        want = logits.log_softmax(-1).gather(1, tokens[0, len(PROMPTS[1]) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), want, atol=2e-4, rtol=0)


def test_prefixes_are_shared_within_an_adapter_only(engine: Engine) -> None:
    for name in NAMES:
        assert engine.generate([PROMPTS[1]], GREEDY, adapter=name)[0].cached_tokens == 0
        assert engine.generate([PROMPTS[1]], GREEDY, adapter=name)[0].cached_tokens == 16


def test_an_adapter_of_the_same_name_is_another_one(engine: Engine, base: Path, answers: dict[Any, list[int]]) -> None:
    engine.generate([PROMPTS[1]], GREEDY, adapter="one")
    engine.drop_adapter("one")
    engine.load_adapter("one", base.parent / "two")
    (completion,) = engine.generate([PROMPTS[1]], GREEDY, adapter="one")
    assert completion.token_ids == answers["two", 1] and completion.cached_tokens == 0


def test_dropping_waits_for_nobody_and_breaks_nobody(engine: Engine, answers: dict[Any, list[int]]) -> None:
    one, none = (engine.add(PROMPTS[2], GREEDY, adapter=name) for name in ("one", ""))
    engine.step()
    with pytest.raises(RequestError, match="'one' is used by 1 requests under way"):
        engine.drop_adapter("one")
    engine.drop_adapter("two")
    engine.cancel(one)
    engine.drop_adapter("one")
    model: Any = engine.model
    assert not any(module._forward_hooks or getattr(module, "corrections", None) for module in model.modules())
    engine.step()
    with pytest.raises(RequestError, match="'one', which is not loaded; loaded: none"):
        engine.add([1], adapter="one")
    later = engine.add(PROMPTS[0], GREEDY)
    tokens = finish(engine, {none: 2, later: 0})
    assert tokens[0] == answers["", 0] and answers["", 2][2:] == tokens[2]


def test_rounded_weights_are_known_by_the_files_they_came_from(plugins: Plugins, base: Path) -> None:
    engine = Engine(load_model(base, plugins.registry, dtype=torch.bfloat16), 0, cache_tokens=256)
    with pytest.raises(RequestError, match=r"cannot be checked against weights in torch.bfloat16.*give `base`"):
        engine.load_adapter("one", base.parent / "one")
    engine.load_adapter("one", base.parent / "one", base)
    assert len(engine.generate([PROMPTS[0]], GREEDY, adapter="one")[0].token_ids) == 12


def test_what_does_not_belong_to_the_model_is_refused(
    plugins: Plugins, engine: Engine, base: Path, tmp_path: Path
) -> None:
    one = base.parent / "one"
    for name, words in (("one", "is loaded already"), ("", "is empty")):
        with pytest.raises(RequestError, match=words):
            engine.load_adapter(name, one)
    with pytest.raises(RequestError, match="belong to those before"):
        engine.update_weights()
    with pytest.raises(RequestError, match=r"has no adapter_config.json and no adapter.safetensors\."):
        engine.load_adapter("three", tmp_path)

    model: Any = engine.model
    with torch.no_grad():
        model.layers[0].attention.o.weight[0, 0] += 1
    with pytest.raises(RequestError, match="was trained on other weights than the engine holds"):
        engine.load_adapter("three", one)

    section, _, factors = adapter_files.read(one)
    config = LoraConfig.model_validate(section)
    wrong = {name: tensor for name, tensor in factors.items() if "layers.0.attention.o" not in name}
    wrong |= {"embedding.weight.rows_XK": torch.zeros(2, 16), "nowhere.a_RK": torch.zeros(2, 2)}
    wrong["layers.0.attention.q_a.weight.a_RK"] = torch.zeros(5, 16)
    adapter_files.write(tmp_path / "wrong", config, {}, wrong)
    with pytest.raises(RequestError) as refused:
        engine.load_adapter("three", tmp_path / "wrong")
    text = "\n".join(refused.value.problems)
    for words in (
        "rows for new tokens (embedding.weight.rows_XK)",
        "'layers.0.attention.o.weight.a_RK' is missing",
        "'nowhere.a_RK' belongs to no matrix",
        "has shape [5, 16]; the model wants [2, 16]",
    ):
        assert words in text
    shutil.copytree(one, tmp_path / "other")
    document = replace_kind((tmp_path / "other" / adapter_files.CONFIG_FILE).read_text())
    (tmp_path / "other" / adapter_files.CONFIG_FILE).write_text(document)
    with pytest.raises(RequestError, match="no adapter that an engine can load"):
        engine.load_adapter("three", tmp_path / "other")


def replace_kind(document: str) -> str:
    """The config of a way of fine-tuning that is not LoRA."""
    return document.replace('"rank"', '"width"')
