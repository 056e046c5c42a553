"""A whole DeepSeek-shaped model (MLA, mixture, MTP) whose training is cut ends bit for bit like one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import Plugins, installed
from deepwright_core.registry import parse
from deepwright_core.stage import StageContext
from deepwright_core.tracking import JsonlTracker, SilentProgress
from deepwright_core.training.objective import language_model_loss
from deepwright_core.training.trainer import Metrics, Trainer, TrainingConfig, train

VALUES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "layers": 2,
    "intermediate_size": 24,
    "first_dense_layers": 1,
    "init_std": 0.2,
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
    "ffn": {
        "name": "moe",
        "experts": 8,
        "top_k": 3,
        "intermediate_size": 8,
        "balance_loss": 0.01,
        "router": {"name": "noaux_tc", "groups": 4, "top_groups": 2, "bias_update_speed": 0.03},
    },
}


class Cut(Exception):
    """The plug is pulled."""


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return installed()


def run(plugins: Plugins, directory: Path, optimizer: str, cut: int | None = None) -> tuple[Transformer, list[Metrics]]:
    directory.mkdir(exist_ok=True)
    model = build_model(plugins.registry, parse(ModelConfig, VALUES, "model", plugins.registry), seed=0)
    built = plugins.registry.build("optimizer", {"name": optimizer}, model, lr=0.01)
    trainer = Trainer(model, built, plugins.registry.build("schedule", {"name": "wsd"}, 6), clip=1.0)
    context = StageContext(
        directory, JsonlTracker(directory / "metrics.jsonl"), SilentProgress(), plugins.registry, plugins.hook
    )
    figures: list[Metrics] = []

    def step(number: int) -> Metrics:
        if number == cut:
            raise Cut
        tokens = torch.randint(40, (3, 17), generator=torch.Generator().manual_seed(number))
        losses: list[float] = []

        def loss() -> Any:
            loss = language_model_loss(model, tokens)
            losses.append(loss.total.item())
            return loss

        figures.append(trainer.update(number, [loss]))
        figures[-1]["loss"] = losses[0]
        return dict(figures[-1])

    train("toy", trainer, TrainingConfig(steps=6, lr=0.01, save_every=2), context, step, {})
    return model, figures


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_cut_run_ends_like_an_uncut_one(plugins: Plugins, tmp_path: Path, optimizer: str) -> None:
    whole, figures = run(plugins, tmp_path / "whole", optimizer)
    for cut in (3, 5):
        with pytest.raises(Cut):
            run(plugins, tmp_path / "cut", optimizer, cut)
    resumed, last = run(plugins, tmp_path / "cut", optimizer)
    assert last == figures[4:]
    bias = whole.layers[1].ffn.router.bias_E
    assert bias.abs().max() > 0  # or the test below would not see that the bias is restored
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_saved_model_predicts_the_same(plugins: Plugins, tmp_path: Path) -> None:
    model, _ = run(plugins, tmp_path / "run", "adamw")
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model", plugins.registry)
    tokens = torch.randint(40, (2, 12))
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded(tokens)), model.logits(model(tokens)))
