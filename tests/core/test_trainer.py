"""The one training loop: a step by hand, the order of events, and a cut-off run that ends like an uncut one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.errors import WorkError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.record import ForwardRecord
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import Registry
from deepwright_core.stage import StageContext
from deepwright_core.tracking import JsonlTracker
from deepwright_core.training.objective import Loss, language_model_loss
from deepwright_core.training.trainer import Metrics, Trainer, TrainingConfig, max_violation, train


def build(registry: Registry) -> Transformer:
    config = ModelConfig(
        vocab_size=20,
        hidden_size=8,
        layers=1,
        intermediate_size=12,
        init_std=0.3,
        mtp={"depth": 1},
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4},
        ffn={"name": "dense"},
    )
    return build_model(registry, config, seed=0)


def trainer_of(registry: Registry, optimizer: str = "adamw", clip: float = 1.0, schedule: Any = None) -> Trainer:
    model = build(registry)
    built = registry.build("optimizer", {"name": optimizer}, model, lr=0.01)
    return Trainer(model, built, schedule or (lambda step: 1.0 / (step + 1)), clip)


def rows(number: int) -> Tensor:
    return torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(number))


# One step -------------------------------------------------------------------------------------------


def test_an_update_is_clipped_gradients_at_the_scheduled_rate(registry: Registry) -> None:
    have, want = trainer_of(registry, clip=0.25, schedule=lambda step: 0.5 if step == 3 else 99.0), build(registry)
    metrics = have.update(3, [lambda: language_model_loss(have.model, rows(0))])
    language_model_loss(want, rows(0)).total.backward()
    norm = torch.stack([p.grad.norm() for p in want.parameters()]).norm()
    assert norm > 0.25
    for parameter in want.parameters():
        parameter.grad *= 0.25 / (norm + 1e-6)
    adamw = registry.build("optimizer", {"name": "adamw"}, want, lr=0.005)
    adamw.step()
    for ours, theirs in zip(have.model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert metrics["gradient_norm"] == pytest.approx(float(norm))
    assert metrics["lr"] == pytest.approx(0.005)


def test_micro_batches_are_one_update(registry: Registry) -> None:
    whole, split = trainer_of(registry), trainer_of(registry)
    whole.update(0, [lambda: language_model_loss(whole.model, rows(0))])

    def part(here: slice) -> Loss:
        return language_model_loss(split.model, rows(0)[here]).scaled(0.5)

    split.update(0, [partial(part, slice(0, 2)), partial(part, slice(2, 4))])
    for ours, theirs in zip(split.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_gradients_of_the_step_before_do_not_leak(registry: Registry) -> None:
    trainer = trainer_of(registry)
    first = trainer.update(0, [lambda: language_model_loss(trainer.model, rows(0))])["gradient_norm"]
    fresh = trainer_of(registry)
    for parameter in fresh.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert fresh.update(0, [lambda: language_model_loss(fresh.model, rows(0))])["gradient_norm"] == first


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_the_run_and_changes_nothing(registry: Registry, broken: float) -> None:
    trainer = trainer_of(registry)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    def loss() -> Loss:
        return language_model_loss(trainer.model, rows(0)).scaled(broken)

    with pytest.raises(WorkError, match=r"step 7 .* not finite"):
        trainer.update(7, [loss])
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not trainer.optimizer.state


def with_loads(trainer: Trainer, *loads: dict[int, list[int]]) -> list[Any]:
    """A loss for each micro-batch that reports these loads."""

    def loss(reported: dict[int, list[int]]) -> Any:
        record = ForwardRecord(loads={layer: torch.tensor(load) for layer, load in reported.items()})
        return SimpleNamespace(total=language_model_loss(trainer.model, rows(0)).total, record=record)

    return [partial(loss, reported) for reported in loads]


def test_routers_are_corrected_once_from_the_load_of_the_whole_batch(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, told = trainer_of(registry), []
    monkeypatch.setattr(trainer.model, "balance", lambda loads: told.append({k: v.tolist() for k, v in loads.items()}))
    metrics = trainer.update(0, with_loads(trainer, {1: [4, 0, 0], 2: [1, 1, 1]}, {1: [2, 3, 0], 2: [3, 0, 0]}))
    assert told == [{1: [6, 3, 0], 2: [4, 1, 1]}]
    assert metrics["expert_max_violation"] == pytest.approx(1.0)  # 6 against a mean of 3, and 4 against 2
    assert metrics["dead_experts"] == 1.0
    trainer.update(1, with_loads(trainer, {1: [0, 0, 5]}))
    assert told[1:] == [{1: [0, 0, 5]}]


def test_a_postponed_correction_sees_the_load_of_all_updates(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, told = trainer_of(registry), []
    monkeypatch.setattr(trainer.model, "balance", lambda loads: told.append({k: v.tolist() for k, v in loads.items()}))
    trainer.update(0, with_loads(trainer, {1: [4, 0]}), rebalance=False)
    trainer.update(0, with_loads(trainer, {1: [1, 2]}), rebalance=False)
    assert told == []
    trainer.rebalance()
    assert told == [{1: [5, 2]}]
    trainer.rebalance()
    assert told[1:] == [{}]


def test_max_violation_by_hand() -> None:
    assert max_violation({}) == 0.0
    assert max_violation({0: torch.tensor([2, 2, 2])}) == 0.0
    assert max_violation({0: torch.tensor([2, 2]), 1: torch.tensor([8, 0, 0, 0])}) == pytest.approx(3.0)


# The loop -------------------------------------------------------------------------------------------


class Told:
    """Collects what the loop says, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []
        self.steps: dict[int, Metrics] = {}

    def deepwright_step_end(self, event: Any) -> None:
        self.events.append(("step", event.step))
        self.steps[event.step] = dict(event.metrics)
        assert event.total_steps == 7 and event.stage == "toy"

    def deepwright_checkpoint_saved(self, event: Any) -> None:
        assert (event.directory / "digests.json").is_file()
        self.events.append(("saved", event.step))

    def deepwright_evaluation_done(self, event: Any) -> None:
        self.events.append(("evaluated", event.step))

    def start(self, description: str, total: int, completed: int = 0) -> None:
        self.events.append(("start", completed, total))

    def advance(self, completed: int, note: str = "") -> None:
        self.events.append(("advance", completed))


class Cut(Exception):
    """The plug is pulled."""


def run(
    registry: Registry, directory: Path, optimizer: str = "adamw", cut: int | None = None, seed: int = 0, **config: Any
) -> tuple[Trainer, Told, dict[str, Any]]:
    """Seven steps; `cut`: the process ends in the middle of that step."""
    directory.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    told, trainer = Told(), trainer_of(registry, optimizer)
    memory: dict[str, Any] = {"words": 0}
    context = StageContext(directory, JsonlTracker(directory / "metrics.jsonl"), told, registry, told)

    def step(number: int) -> Metrics:
        noise = torch.rand(4, 1) < 0.5  # a step may draw from the global generator: it is part of the checkpoint
        tokens = torch.where(noise, rows(number), rows(number + 100))
        memory["words"] += 36

        def loss() -> Loss:
            if number == cut:
                raise Cut
            return language_model_loss(trainer.model, tokens)

        return {"loss": 0.0, **trainer.update(number, [loss])}

    def evaluate(number: int) -> Metrics:
        assert not trainer.model.training
        with torch.no_grad():
            return {"nats": float(language_model_loss(trainer.model, rows(1000)).next_token)}

    settings = TrainingConfig(steps=7, lr=0.01, **{"save_every": 2, "evaluate_every": 3, **config})
    train("toy", trainer, settings, context, step, memory, evaluate)
    return trainer, told, memory


def test_the_order_of_things(registry: Registry, tmp_path: Path) -> None:
    trainer, told, memory = run(registry, tmp_path)
    step = [[("advance", n), ("step", n)] for n in range(8)]
    assert told.events == [
        ("start", 0, 7),
        ("evaluated", 0),
        *step[1],
        *step[2],
        ("saved", 2),
        *step[3],
        ("evaluated", 3),
        *step[4],
        ("saved", 4),
        *step[5],
        *step[6],
        ("evaluated", 6),
        ("saved", 6),
        *step[7],
        ("evaluated", 7),
        ("saved", 7),
    ]
    assert [figures["step"] for figures in memory["evaluations"]] == [0, 3, 6, 7]
    assert memory["evaluations"][-1]["nats"] < memory["evaluations"][0]["nats"]
    assert memory["words"] == 7 * 36 and memory["seconds"] > 0
    assert not trainer.model.training
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000006", "step-00000007"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == list(range(1, 8))
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([0.01 / n for n in range(1, 8)])


def test_zero_means_only_at_the_end(registry: Registry, tmp_path: Path) -> None:
    _, told, _ = run(registry, tmp_path, save_every=0, evaluate_every=0)
    assert [event for event in told.events if event[0] in ("saved", "evaluated")] == [
        ("evaluated", 0),
        ("evaluated", 7),
        ("saved", 7),
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("cuts", [[0], [1], [3], [6], [2, 3, 3, 5]], ids=str)
def test_a_run_that_was_cut_ends_bit_for_bit_like_one_that_was_not(
    registry: Registry, tmp_path: Path, optimizer: str, cuts: list[int]
) -> None:
    whole, whole_told, whole_memory = run(registry, tmp_path / "whole", optimizer)
    for n, cut in enumerate(cuts):
        with pytest.raises(Cut):
            # Another seed each time: after the first checkpoint nothing may depend on it.
            run(registry, tmp_path / "cut", optimizer, cut, seed=n if cut > 1 and n else 0)
    resumed, told, memory = run(registry, tmp_path / "cut", optimizer, seed=77 if cuts[-1] > 1 else 0)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    done = cuts[-1] // 2 * 2
    assert told.events[0] == ("start", done, 7)
    assert sorted(told.steps) == list(range(done + 1, 8))
    timed = ("step_seconds",)
    for number, metrics in told.steps.items():
        want = {key: value for key, value in whole_told.steps[number].items() if key not in timed}
        assert {key: value for key, value in metrics.items() if key not in timed} == want
    assert memory["evaluations"] == whole_memory["evaluations"]
    assert memory["words"] == whole_memory["words"]


def test_a_finished_run_is_not_run_again(registry: Registry, tmp_path: Path) -> None:
    first, _, memory = run(registry, tmp_path)
    again, told, remembered = run(registry, tmp_path)
    assert told.events == [("start", 7, 7)]
    assert remembered == memory
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)
