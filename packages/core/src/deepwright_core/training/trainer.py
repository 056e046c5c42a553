"""The one training loop: every stage that changes weights goes through it.

`Trainer.update` is one optimizer step from any number of micro-batch losses; `train` repeats a stage's step with
checkpoints, metrics, progress and evaluation, and goes on where the newest checkpoint stands. A step must depend on
nothing but the weights, the optimizer and its own number: then a run that was cut ends like one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..events import CheckpointEvent, EvaluationEvent, StepEvent
from ..model.precision import autocast
from ..model.record import ForwardRecord
from ..model.transformer import Transformer
from ..stage import StageContext
from .checkpoint import Checkpoints
from .schedule import Schedule

Metrics = dict[str, float]


class TrainingConfig(BaseModel):
    """What every training stage can be told.

    steps: optimizer steps. lr: peak learning rate. clip: largest gradient norm.
    save_every, evaluate_every: in steps (0: only at the end).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(ge=1)
    lr: float = Field(gt=0)
    clip: float = Field(1.0, gt=0)
    save_every: int = Field(100, ge=0)
    evaluate_every: int = Field(0, ge=0)


class Differentiable(Protocol):
    """A loss to differentiate, with what the forward pass reported."""

    @property
    def total(self) -> Tensor: ...

    @property
    def record(self) -> ForwardRecord: ...


def max_violation(loads: Mapping[int, Tensor]) -> float:
    """How far the busiest expert of any layer is above an even load: max load / mean load - 1. 0 is perfect."""
    if not loads:
        return 0.0
    return max(float(load_E.max() / load_E.float().mean().clamp(min=1e-9)) - 1 for load_E in loads.values())


class Trainer:
    """A model with its optimizer: knows how to take one step."""

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        clip: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.clip, self.dtype = model, optimizer, schedule, clip, dtype
        self.device = next(model.parameters()).device

    def update(self, step: int, losses: Iterable[Callable[[], Differentiable]]) -> Metrics:
        """One optimizer step at the schedule's place `step`. Each callable computes the loss of one micro-batch, scaled
        so that the losses add up to the batch's."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loads: dict[int, Tensor] = {}
        for compute in losses:
            with autocast(self.device, self.dtype):
                loss = compute()
            loss.total.backward()  # type: ignore[no-untyped-call]
            for layer, load_E in loss.record.loads.items():
                loads[layer] = loads[layer] + load_E if layer in loads else load_E
        factor = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, error_if_nonfinite=True)
        self.optimizer.step()
        self.model.balance(loads)
        metrics = {"gradient_norm": float(norm), "lr": float(self.optimizer.param_groups[0]["lr"])}
        if loads:
            metrics["expert_max_violation"] = max_violation(loads)
            metrics["dead_experts"] = float(sum(int((load_E == 0).sum()) for load_E in loads.values()))
        return metrics


def train(
    stage: str,
    trainer: Trainer,
    config: TrainingConfig,
    context: StageContext,
    step: Callable[[int], Metrics],
    memory: dict[str, Any],
    evaluate: Callable[[int], Metrics] | None = None,
    note: Callable[[Metrics], str] = lambda metrics: f"loss {metrics['loss']:.3f}",
) -> None:
    """Run `step(number)` for every step that is not done yet.

    `memory` is filled from the checkpoint after a resume and saved with each; it must stay JSON. It carries
    "seconds", the time spent in steps so far, and "evaluations", the figures of each evaluation.
    """
    checkpoints = Checkpoints(context.directory / "checkpoints")
    done = 0
    restored = checkpoints.restore(trainer.model, trainer.optimizer)
    if restored is not None:
        done, kept = restored
        memory.update(kept)
    memory.setdefault("seconds", 0.0)
    memory.setdefault("evaluations", [])

    def assess(number: int) -> None:
        if evaluate is None:
            return
        trainer.model.eval()
        figures = evaluate(number)
        memory["evaluations"].append({"step": number, **figures})
        context.tracker.metrics(figures, number)
        context.hook.deepwright_evaluation_done(event=EvaluationEvent(stage, number, "validation", figures))

    context.progress.start(stage, config.steps, done)
    if restored is None:
        assess(0)
    for number in range(done, config.steps):
        began = time.perf_counter()
        metrics = step(number)
        seconds = time.perf_counter() - began
        memory["seconds"] += seconds
        finished = number + 1
        metrics["step_seconds"] = seconds
        context.tracker.metrics(metrics, finished)
        context.progress.advance(finished, note(metrics))
        context.hook.deepwright_step_end(event=StepEvent(stage, finished, config.steps, metrics))
        last = finished == config.steps
        if last or (config.evaluate_every and finished % config.evaluate_every == 0):
            assess(finished)
        if last or (config.save_every and finished % config.save_every == 0):
            directory = checkpoints.save(finished, trainer.model, trainer.optimizer, memory)
            context.hook.deepwright_checkpoint_saved(event=CheckpointEvent(stage, finished, directory))
    trainer.model.eval()
