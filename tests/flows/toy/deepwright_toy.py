"""A plugin for the workflow's tests: three small stages that count instead of learning, and an optimizer to choose.

`learn` sums numbers step by step, checkpoints, resumes, and can be told to be slow or to fail.
"""

from __future__ import annotations

import errno
import json
import os
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deepwright_core.errors import RequestError
from deepwright_core.events import CheckpointEvent
from deepwright_core.hookspecs import hookimpl
from deepwright_core.registry import ComponentConfig
from deepwright_core.stage import Stage, StageResult, write_atomically
from deepwright_kernels import choices


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GatherConfig(Section):
    numbers: int = Field(20, gt=0)


class LearnConfig(Section):
    steps: int = Field(20, gt=0)
    every: int = Field(5, gt=0)
    pause: float = 0.0
    fail: Literal["", "crash", "disk", "request", "die"] = ""
    rate: float = 0.1


class JudgeConfig(Section):
    bar: float = 0.5


class Walk(ComponentConfig):
    """Walks straight ahead."""

    pace: float = Field(1.0, gt=0)


class Leap(ComponentConfig):
    """Leaps; how far must be said."""

    length: int


def gather(config: GatherConfig) -> Stage:
    """Writes numbers."""

    def run(sections: Any, context: Any) -> StageResult:
        lines = "".join(f"{n}\n" for n in range(sections["gather"].numbers))
        write_atomically(context.directory / "numbers.txt", lines)
        return StageResult({"numbers": "numbers.txt"}, {"count": float(sections["gather"].numbers)}, tokens=20)

    return Stage("gather", ("gather",), {}, run)


def learn(config: LearnConfig) -> Stage:
    """Adds numbers up, with checkpoints."""

    def run(sections: Any, context: Any) -> StageResult:
        options, pace = sections["learn"], getattr(sections["optimizer"], "pace", 2.0)
        numbers = [int(line) for line in context.inputs["numbers"].read_text().splitlines()]
        saved = context.directory / "checkpoints" / "latest.json"
        step, total = json.loads(saved.read_text()) if saved.is_file() else (0, 0.0)
        context.tracker.parameters({"numbers": len(numbers)})
        chosen = {operator: backend for operator, backend in choices().items() if backend != "auto"}
        write_atomically(context.directory / "kernels.json", json.dumps(chosen))
        context.progress.start("adding", options.steps, step)
        with (context.directory / "visits.txt").open("a") as file:
            file.write(f"{step}\n")
        while step < options.steps:
            time.sleep(options.pause)
            total += numbers[step % len(numbers)] * pace
            step += 1
            context.tracker.metrics({"total": total, "loss": 1 / step}, step)
            context.progress.advance(step, f"total {total:g}")
            if step % options.every == 0:
                write_atomically(saved, json.dumps([step, total]))
                context.hook.deepwright_checkpoint_saved(event=CheckpointEvent("learn", step, saved.parent))
            while os.environ.get("TOY_HOLDS_AT") == str(step):  # until it is killed
                time.sleep(0.05)
            if options.fail and step == options.steps // 2:
                if options.fail == "disk":
                    raise OSError(errno.ENOSPC, "No space left on device")
                if options.fail == "request":
                    raise RequestError("learn.rate is too bold.")
                if options.fail == "die":
                    os.write(2, b"the last words of learn\n")
                    os.abort()
                raise ValueError("the numbers do not add up")
        model = context.directory / "model"
        model.mkdir(exist_ok=True)
        write_atomically(model / "model.safetensors", f"{total!r}")
        write_atomically(model / "config.json", "{}")
        return StageResult({"model": "model"}, {"total": total}, ("total", 0.0, total), tokens=100, flops=2e9)

    return Stage("learn", ("learn", "optimizer", "seed", "kernels"), {"numbers": "gather"}, run)


def judge(config: JudgeConfig) -> Stage:
    """Looks at the sum."""

    def run(sections: Any, context: Any) -> StageResult:
        total = float((context.inputs["model"] / "model.safetensors").read_text())
        write_atomically(context.directory / "verdict.txt", f"{total > sections['judge'].bar}\n")
        context.tracker.artifact(context.directory / "verdict.txt", "samples")
        return StageResult({"verdict": "verdict.txt"}, {"score": 1.0}, ("score", None, 1.0))

    return Stage("judge", ("judge",), {"model": "learn"}, run)


@hookimpl
def deepwright_register(registry: Any) -> None:
    registry.add("stage", "gather", config=GatherConfig)(gather)
    registry.add("stage", "learn", config=LearnConfig)(learn)
    registry.add("stage", "judge", config=JudgeConfig)(judge)
    registry.add("optimizer", "walk", config=Walk)(lambda config: config)
    registry.add("optimizer", "leap", config=Leap)(lambda config: config)


@hookimpl
def deepwright_commands(cli: Any) -> None:
    import click

    @cli.command("wave")
    def wave() -> None:
        """Says hello."""
        click.echo("hello from a plugin")
