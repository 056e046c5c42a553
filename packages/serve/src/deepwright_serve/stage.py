"""The serve stage: start the server, have it answer held-out problems over HTTP, stop it or leave it up.

What is measured is what a client sees: the answers come through the chat form, the engine, the stream and the socket,
and each is judged by its task's own scorer. Left out: load beyond `concurrency` clients (a benchmark's work).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field

from deepwright_core.engine import CacheDtype
from deepwright_core.errors import RequestError, WorkError
from deepwright_core.stage import Stage, StageContext, StageResult, write_atomically
from deepwright_core.tasks import Problem, load_problems, score

from . import child

ANSWERS = "answers.jsonl"
SERVER = "server"


class ServeConfig(BaseModel):
    """Serving the trained model and asking it held-out problems over HTTP."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    problems: int = Field(32, ge=1, description="held-out test problems to ask (fewer if there are fewer)")
    port: int = Field(0, ge=0, le=65535, description="0: any free one")
    keep: bool = Field(False, description="leave the server up after the pipeline")
    concurrency: int = Field(8, ge=1, le=256, description="clients that ask at the same time")
    max_tokens: int = Field(256, ge=1, description="longest answer, thinking included")
    temperature: float = Field(0.0, ge=0, le=2, description="0: greedy")
    thinking: Literal["auto", "enabled", "disabled"] = Field("auto", description="auto: the model decides")
    model_name: str = Field("deepwright", min_length=1, max_length=256, description="the model's name in requests")
    cache_tokens: int = Field(65536, ge=64, description="tokens that the engine's cache holds")
    cache_dtype: CacheDtype = Field("auto", description="auto: the weights'; fp8: latents in FP8, for latent attention")
    ready_seconds: float = Field(120.0, gt=0, description="time that the server has to become ready")
    answer_seconds: float = Field(300.0, gt=0, description="deadline of each answer")


@dataclass(frozen=True)
class Answered:
    """One problem as it was asked and answered over HTTP; a line of answers.jsonl. Times in seconds."""

    problem: str
    question: str
    expected: str
    answer: str
    reasoning: str
    correct: bool
    finish_reason: str
    tokens: int
    first_token: float
    latency: float


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
    options = ["--name", config.model_name, "--cache-tokens", str(config.cache_tokens)]
    options += ["--cache-dtype", config.cache_dtype]
    options += ["--precision", str(sections["precision"]), "--threads", str(sections["threads"])]
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
        began = time.perf_counter()
        answers = ask_all(server.address, problems, config, context)
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
    tokens = sum(answer.tokens for answer in answers)
    accuracy = statistics.fmean(answer.correct for answer in answers)
    metrics = {
        "accuracy": accuracy,
        "answers": float(len(answers)),
        "requests_per_second": len(answers) / seconds,
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": statistics.fmean(answer.first_token for answer in answers),
        "latency": statistics.fmean(answer.latency for answer in answers),
        "cut_off_share": statistics.fmean(answer.finish_reason == "length" for answer in answers),
    }
    context.tracker.metrics(metrics, step=len(answers))
    outputs = {"answers": ANSWERS}
    if config.keep:
        outputs["server"] = f"{SERVER}/address.json"
    return StageResult(outputs, metrics, ("HTTP accuracy", None, accuracy), tokens=tokens)


def ask_all(address: str, problems: Sequence[Problem], config: ServeConfig, context: StageContext) -> list[Answered]:
    """Every problem's answer, in the order of the problems."""
    context.progress.start("asking over HTTP", len(problems))
    answers: dict[int, Answered] = {}
    with (
        httpx.Client(base_url=address, timeout=config.answer_seconds, trust_env=False) as client,
        ThreadPoolExecutor(config.concurrency, thread_name_prefix="client") as pool,
    ):
        waiting = {pool.submit(ask, client, problem, config): place for place, problem in enumerate(problems)}
        try:
            for done in as_completed(waiting):
                answers[waiting[done]] = done.result()
                right = sum(answer.correct for answer in answers.values())
                context.progress.advance(len(answers), f"{right} of {len(answers)} right")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [answers[place] for place in range(len(problems))]


def ask(client: httpx.Client, problem: Problem, config: ServeConfig) -> Answered:
    """One problem, streamed."""
    body = {
        "model": config.model_name,
        "messages": [{"role": "user", "content": problem.question}],
        "temperature": config.temperature,
        "max_tokens": config.max_tokens,
        "thinking": {"type": config.thinking},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = reasoning = finish_reason = ""
    tokens, began, first = 0, time.perf_counter(), None
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                raise WorkError(f"The server answered a problem with status {reply.status_code}: {reply.text[:500]}")
            for event in events(reply.iter_lines()):
                if "error" in event:
                    raise WorkError(f"The server broke off an answer: {event['error']['message']}")
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event["choices"]:
                    thought = choice["delta"].get("reasoning_content") or ""
                    said = choice["delta"].get("content") or ""
                    if first is None and (thought or said or choice["finish_reason"]):
                        first = time.perf_counter() - began
                    reasoning, answer = reasoning + thought, answer + said
                    finish_reason = choice["finish_reason"] or finish_reason
    except httpx.HTTPError as error:
        raise WorkError(f"The server could not be asked: {type(error).__name__}: {error}.") from error
    latency = time.perf_counter() - began
    return Answered(
        problem=problem.id,
        question=problem.question,
        expected=problem.answer,
        answer=answer,
        reasoning=reasoning,
        correct=score(problem, answer) >= 1.0,
        finish_reason=finish_reason,
        tokens=tokens,
        first_token=latency if first is None else first,
        latency=latency,
    )


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to the end mark."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        if data != line:
            yield json.loads(data)
