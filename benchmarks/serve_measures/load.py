"""Requests that arrive by chance (a Poisson process), and how long each waits for its first token and for the next."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from deepwright_core.engine import Engine, SamplingParams

from .throughput import prompts


@dataclass(frozen=True)
class Load:
    """Latencies in milliseconds by percentile; gaps are between one token of a request and the next."""

    requests_per_second: float
    tokens_per_second: float
    most_at_once: int
    first_token: dict[str, float]
    gap: dict[str, float]


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds."""
    ordered = sorted(seconds)
    return {f"p{p}": 1e3 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)}


def poisson(engine: Engine, rate: float, requests: int, prompt: int, tokens: int, seed: int) -> Load:
    """`requests` requests at `rate` a second on average, each of `prompt` tokens in and `tokens` out.

    seed: of the prompts, which must be new to the engine, or its prefix cache has them.
    """
    draw = random.Random(0)
    arrivals, at = [], 0.0
    for _ in range(requests):
        at += draw.expovariate(rate)
        arrivals.append(at)
    waiting = prompts(engine.model.config.vocab_size, requests, prompt, seed)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    arrived: dict[int, float] = {}
    last: dict[int, float] = {}
    first_token, gaps, next_one, most = [], [], 0, 0
    start = time.perf_counter()
    while next_one < requests or engine.has_work:
        now = time.perf_counter() - start
        while next_one < requests and arrivals[next_one] <= now:
            arrived[engine.add(waiting[next_one], params)] = arrivals[next_one]
            next_one += 1
        if not engine.has_work:
            time.sleep(max(0.0, arrivals[next_one] - now))
            continue
        events = engine.step()
        most = max(most, engine.stats.running)
        now = time.perf_counter() - start
        for event in events:
            if event.request_id not in last:
                first_token.append(now - arrived[event.request_id])
            else:
                gaps.append(now - last[event.request_id])
            last[event.request_id] = now
    return Load(
        rate,
        requests * tokens / (time.perf_counter() - start),
        most,
        percentiles(first_token),
        percentiles(gaps),
    )
