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

from ..errors import WorkError
from ..events import CheckpointEvent, EvaluationEvent, StepEvent
from ..model.precision import autocast
from ..model.record import ForwardRecord
from ..model.transformer import Transformer
from ..stage import StageContext
from .checkpoint import Checkpoints
from .schedule import Schedule

Metrics = dict[str, float]

# Weight of the newest step in the running mean of the load figures: about the last ten steps count.
BALANCE_MEMORY = 0.1


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
    """A model with its optimizer: knows how to take one step.

    balances: whether the routers correct their bias from the load; those of a model whose routers are frozen must not.
    """

    def __init__(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        clip: float,
        dtype: torch.dtype = torch.float32,
        balances: bool = True,
    ) -> None:
        self.model, self.optimizer, self.schedule, self.clip, self.dtype = model, optimizer, schedule, clip, dtype
        self.balances = balances
        self.device = next(model.parameters()).device
        self._loads: dict[int, Tensor] = {}

    def update(self, step: int, losses: Iterable[Callable[[], Differentiable]], *, rebalance: bool = True) -> Metrics:
        """One optimizer step at the schedule's place `step`. Each callable computes the loss of one micro-batch, scaled
        so that the losses add up to the batch's. With `rebalance=False` the routers' correction waits for
        `rebalance()`: several updates then see one routing bias."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loads = self._loads
        for compute in losses:
            with autocast(self.device, self.dtype):
                loss = compute()
            loss.total.backward()
            for layer, load_E in loss.record.loads.items():
                loads[layer] = loads[layer] + load_E if layer in loads else load_E
        factor = self.schedule(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        if not torch.isfinite(norm):
            raise WorkError(
                f"The gradient of step {step} has the norm {float(norm)}, which is not finite; "
                "no weight was changed. Lower the learning rate, or set precision=fp32."
            )
        self.optimizer.step()
        metrics = {"gradient_norm": float(norm), "lr": float(self.optimizer.param_groups[0]["lr"])}
        if loads:
            metrics["expert_max_violation"] = max_violation(loads)
            metrics["dead_experts"] = float(sum(int((load_E == 0).sum()) for load_E in loads.values()))
        if rebalance:
            self.rebalance()
        return metrics

    def rebalance(self) -> None:
        """Let the routers correct themselves from the load since the last correction."""
        if self.balances:
            self.model.balance(self._loads)
        self._loads = {}


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
    "seconds", the time spent in steps so far, "evaluations", the figures of each evaluation, and "balance", how even
    the experts' load was over the first and the last steps.
    """
    checkpoints = Checkpoints(context.directory / "checkpoints")
    done = 0
    restored = checkpoints.restore(trainer.model, trainer.optimizer)
    if restored is not None:
        done, kept = restored
        memory.update(kept)
    memory.setdefault("seconds", 0.0)
    memory.setdefault("evaluations", [])
    memory.setdefault("balance", {})

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
        _remember_balance(memory["balance"], metrics)
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


def _remember_balance(balance: dict[str, float], metrics: Metrics) -> None:
    """Keep the first steps' and a running mean of the last steps' load figures, if the model has experts at all."""
    violation = metrics.get("expert_max_violation")
    if violation is None:
        return
    balance.setdefault("expert_max_violation_first", violation)
    last = balance.get("expert_max_violation_last", violation)
    balance["expert_max_violation_last"] = last + BALANCE_MEMORY * (violation - last)
    balance["dead_experts"] = metrics["dead_experts"]
