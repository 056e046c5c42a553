"""Decode and prefill: tokens a second of the engine itself, and how near memory's limit a decode step comes.

The roofline of a decode step is the bytes that it has to read once, over the rate at which this machine copies: every
dense weight, the experts that some token chooses (uniform routing: E · (1 - (1 - k/E)^B) of E), and each sequence's
cache.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.model.cost import Cost

WARM_STEPS = 5


@dataclass(frozen=True)
class Decode:
    """One row of the table. tokens_a_step: of one sequence, more than 1 with speculation; accepted: how often the first
    draft of a step was accepted, the second, ..."""

    batch: int
    context: int
    tokens_per_second: float
    milliseconds: float
    slowest_milliseconds: float
    bytes_read: float
    roofline_share: float
    tokens_a_step: float
    accepted: list[float]


def prompts(vocabulary: int, count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, the same every time."""
    draw = random.Random(seed)
    return [[draw.randrange(1, vocabulary) for _ in range(length)] for _ in range(count)]


def own_texts(engine: Engine, count: int, length: int) -> list[list[int]]:
    """What the model itself writes: prompts that a trained model's modules can guess the continuation of."""
    beginnings = prompts(engine.model.config.vocab_size, count, 1)
    written = engine.generate(beginnings, SamplingParams(max_tokens=length, ignore_eos=True))
    return [first + rest.token_ids for first, rest in zip(beginnings, written, strict=True)]


def synchronise(device: torch.device) -> None:
    """Wait for the device, if it works beside the host."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def step_bytes(cost: Cost, batch: int, context: int, weight_bytes: int, cache_bytes: int) -> float:
    """What a decode step over `batch` sequences has to read."""
    parts = {name: part.total for name, part in cost.parts.items() if name != "embedding"}
    experts = parts.pop("routed_experts", 0)
    if cost.mixture is not None:
        experts *= 1 - (1 - cost.mixture.top_k / cost.mixture.experts) ** batch
    head = cost.parts["embedding"].total if not cost.parts["head"].total else 0  # tied
    return (sum(parts.values()) + head + experts) * weight_bytes + batch * context * cache_bytes


def decode(
    engine: Engine,
    cost: Cost,
    given: list[list[int]],
    steps: int,
    temperature: float,
    rate: float,
    adapters: Sequence[str] = ("",),
) -> Decode:
    """Decode all of the prompts `given` for `steps` steps; scheduling, sampling and copies included.

    rate: bytes that the machine copies, in units of 10¹² a second. adapters: names, used in turn.
    """
    runner = engine._runner
    batch, weight = len(given), next(iter(engine.model.parameters()))
    ids = [
        engine.add(
            prompt,
            SamplingParams(max_tokens=1 << 20, temperature=temperature, seed=i, ignore_eos=True),
            adapter=adapters[i % len(adapters)],
        )
        for i, prompt in enumerate(given)
    ]
    while len(engine._scheduler.decoding) < batch:
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    context = sum(len(sequence) for sequence in engine._scheduler.decoding) // batch
    synchronise(runner.device)
    before, times = engine.stats, []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    after = engine.stats
    for request in ids:
        engine.cancel(request)
    while engine.has_work:
        engine.step()
    tokens, step = (after.generation_tokens - before.generation_tokens) / steps, statistics.median(times)
    drafted = max(1, after.draft_steps - before.draft_steps)
    cache_bytes = sum(layer.element_size() * layer.shape[1] for layer in runner.cache)
    read = step_bytes(cost, batch, context + steps // 2, weight.element_size(), cache_bytes)
    return Decode(
        batch,
        context,
        tokens_per_second=tokens / step,
        milliseconds=1e3 * step,
        slowest_milliseconds=1e3 * max(times),
        bytes_read=read,
        roofline_share=read / (rate * 1e12) / step,
        tokens_a_step=tokens / batch,
        accepted=[(now - then) / drafted for now, then in zip(after.accepted_at, before.accepted_at, strict=True)],
    )


def prefill(engine: Engine, count: int, length: int, repeats: int) -> float:
    """Prompt tokens a second, the first token of each answer included; the best of `repeats`."""
    device = engine._runner.device
    best = 0.0
    for repeat in range(1 + repeats):  # the first warms up
        for ids in prompts(engine.model.config.vocab_size, count, length, seed=1 + repeat):
            engine.add(ids, SamplingParams(max_tokens=1, temperature=0))
        synchronise(device)
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        synchronise(device)
        if repeat:
            best = max(best, count * length / (time.perf_counter() - start))
    return best
