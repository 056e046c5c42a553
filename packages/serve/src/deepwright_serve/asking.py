"""Asking a server held-out problems as a client would, and what came of it in figures.

The answers come through the chat form, the engine, the stream and the socket, and each is judged by its task's own
scorer. Left out: load beyond `concurrency` clients (a benchmark's work).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field

from deepwright_core.tasks import Problem, score


class Asking(BaseModel):
    """How held-out problems are asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    problems: int = Field(32, ge=1, description="held-out test problems to ask (fewer if there are fewer)")
    concurrency: int = Field(8, ge=1, le=256, description="clients that ask at the same time")
    max_tokens: int = Field(256, ge=1, description="longest answer, thinking included")
    temperature: float = Field(0.0, ge=0, le=2, description="0: greedy")
    thinking: Literal["auto", "enabled", "disabled"] = Field("auto", description="auto: the model decides")
    answer_seconds: float = Field(300.0, gt=0, description="deadline of each answer")


@dataclass(frozen=True)
class Answered:
    """One problem as it was asked and answered over HTTP; a line of answers.jsonl. Times in seconds.

    error: a sentence when there was no whole answer.
    """

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
    error: str = ""


@dataclass(frozen=True)
class Figures:
    """What many answers were like. Times in seconds; shares from 0 to 1.

    accuracy: share of right answers. failed: share without a whole answer. well_formed: share that ended of itself with
    something said after the thinking. first_token, latency: means. token_seconds: mean time between tokens.
    """

    answers: int
    accuracy: float
    failed: float
    well_formed: float
    cut_off: float
    first_token: float
    latency: float
    token_seconds: float
    tokens: int

    @classmethod
    def of(cls, answers: Sequence[Answered]) -> Figures:
        """Figures of at least one answer; times are those of whole answers (0 without one)."""
        whole = [answer for answer in answers if not answer.error]

        def mean(values: Sequence[float]) -> float:
            return statistics.fmean(values) if values else 0.0

        later = [a for a in whole if a.tokens > 1]
        return cls(
            answers=len(answers),
            accuracy=mean([float(a.correct) for a in answers]),
            failed=mean([float(bool(a.error)) for a in answers]),
            well_formed=mean([float(a.finish_reason == "stop" and bool(a.answer.strip())) for a in answers]),
            cut_off=mean([float(a.finish_reason == "length") for a in answers]),
            first_token=mean([a.first_token for a in whole]),
            latency=mean([a.latency for a in whole]),
            token_seconds=mean([(a.latency - a.first_token) / (a.tokens - 1) for a in later]),
            tokens=sum(a.tokens for a in answers),
        )


def ask_all(
    address: str,
    model: str,
    problems: Sequence[Problem],
    asking: Asking,
    on_answer: Callable[[Answered], None],
    headers: Mapping[str, str] | None = None,
) -> list[Answered]:
    """Every problem's answer, in the order of the problems. `on_answer` hears each as it comes; what it raises ends
    the asking."""
    answers: dict[int, Answered] = {}
    with (
        httpx.Client(base_url=address, timeout=asking.answer_seconds, trust_env=False, headers=headers) as client,
        ThreadPoolExecutor(asking.concurrency, thread_name_prefix="client") as pool,
    ):
        waiting = {pool.submit(ask, client, model, problem, asking): place for place, problem in enumerate(problems)}
        try:
            for done in as_completed(waiting):
                answers[waiting[done]] = done.result()
                on_answer(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [answers[place] for place in range(len(problems))]


def ask(client: httpx.Client, model: str, problem: Problem, asking: Asking) -> Answered:
    """One problem, streamed."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": problem.question}],
        "temperature": asking.temperature,
        "max_tokens": asking.max_tokens,
        "thinking": {"type": asking.thinking},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = reasoning = finish_reason = error = ""
    tokens, began, first = 0, time.perf_counter(), None
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                reply.read()
                error = f"The server answered a problem with status {reply.status_code}: {reply.text[:500]}"
            for event in events(reply.iter_lines()) if not error else ():
                if "error" in event:
                    error = f"The server broke off an answer: {event['error']['message']}"
                    break
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                for choice in event["choices"]:
                    thought = choice["delta"].get("reasoning_content") or ""
                    said = choice["delta"].get("content") or ""
                    if first is None and (thought or said or choice["finish_reason"]):
                        first = time.perf_counter() - began
                    reasoning, answer = reasoning + thought, answer + said
                    finish_reason = choice["finish_reason"] or finish_reason
    except httpx.HTTPError as failure:
        error = f"The server could not be asked: {type(failure).__name__}: {failure}."
    if not error and not finish_reason:
        error = "The server ended an answer without saying why."
    latency = time.perf_counter() - began
    return Answered(
        problem=problem.id,
        question=problem.question,
        expected=problem.answer,
        answer=answer,
        reasoning=reasoning,
        correct=not error and score(problem, answer) >= 1.0,
        finish_reason=finish_reason,
        tokens=tokens,
        first_token=latency if first is None else first,
        latency=latency,
        error=error,
    )


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to the end mark."""
    for line in lines:
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return
        if data != line:
            yield json.loads(data)
