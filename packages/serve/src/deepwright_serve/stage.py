"""The serve stage: start the server, have it answer held-out problems over HTTP, stop it or leave it up.

What is measured is what a client sees (see `asking`). Left out: going live in place of another version (`deepwright
promote`): a stage's result can be reused, what happens to a running server cannot.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pydantic import Field, model_validator

from deepwright_core.errors import RequestError, WorkError
from deepwright_core.stage import Stage, StageContext, StageResult, write_atomically
from deepwright_core.tasks import load_problems

from . import child
from .asking import Answered, Asking, Figures, ask_all
from .engine_options import EngineOptions

ANSWERS = "answers.jsonl"
SERVER = "server"


class ServeConfig(Asking, EngineOptions):
    """Serving the trained model and asking it held-out problems over HTTP."""

    port: int = Field(0, ge=0, le=65535, description="0: any free one")
    keep: bool = Field(False, description="leave the server up after the pipeline")
    model_name: str = Field("deepwright", min_length=1, max_length=256, description="the model's name in requests")
    ready_seconds: float = Field(120.0, gt=0, description="time that the server has to become ready")

    @model_validator(mode="after")
    def _names_differ(self) -> ServeConfig:
        if self.model_name in self.adapters:
            raise ValueError(f"adapters names one '{self.model_name}', which is the model's own name; choose another.")
        return self


def build(config: ServeConfig) -> Stage:
    """Serve the model and have it answer held-out problems over HTTP."""
    return Stage(
        name="serve",
        sections=("serve", "precision", "threads"),
        needs={"rl_model": "rl", "problems": "prepare"},
        run=run,
        start="rl_model",
    )


def run(sections: Mapping[str, Any], context: StageContext) -> StageResult:
    """Start, ask, judge, write, stop."""
    config: ServeConfig = sections["serve"]
    held_out = context.inputs["problems"] / "test.jsonl"
    problems = load_problems(held_out)[: config.problems]
    if not problems:
        raise RequestError(f"{held_out} holds no problem; have the prepare stage make more test problems.")
    options = [f"--name={config.model_name}", *config.arguments()]
    options += child.model_options(sections["precision"], sections["threads"])
    context.progress.start("starting the server", 1)
    server = child.start(
        context.inputs["rl_model"],
        context.directory / SERVER,
        options,
        port=config.port,
        keep=config.keep,
        limit=config.ready_seconds,
    )
    try:
        context.progress.advance(1, server.address)
        context.progress.start("asking over HTTP", len(problems))
        asked, right = 0, 0

        def on_answer(answer: Answered) -> None:
            nonlocal asked, right
            if answer.error:
                raise WorkError(answer.error)
            asked, right = asked + 1, right + answer.correct
            context.progress.advance(asked, f"{right} of {asked} right")

        began = time.perf_counter()
        answers = ask_all(server.address, config.model_name, problems, config, on_answer)
        seconds = time.perf_counter() - began
        write_atomically(
            context.directory / ANSWERS,
            "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers),
        )
    except BaseException:
        # Also a server that was to be kept: one that could not answer is not left behind.
        server.stop(10)
        raise
    if config.keep:
        context.tracker.parameters({"server_address": server.address, "server_pid": server.pid})
    else:
        server.stop(30)
    context.tracker.artifact(context.directory / ANSWERS)
    figures = Figures.of(answers)
    metrics = {
        "accuracy": figures.accuracy,
        "answers": float(figures.answers),
        "requests_per_second": figures.answers / seconds,
        "tokens_per_second": figures.tokens / seconds,
        "time_to_first_token": figures.first_token,
        "latency": figures.latency,
        "cut_off_share": figures.cut_off,
        "well_formed_share": figures.well_formed,
    }
    context.tracker.metrics(metrics, step=len(answers))
    outputs = {"answers": ANSWERS}
    if config.keep:
        outputs["server"] = f"{SERVER}/address.json"
    return StageResult(outputs, metrics, ("HTTP accuracy", None, figures.accuracy), tokens=figures.tokens)
