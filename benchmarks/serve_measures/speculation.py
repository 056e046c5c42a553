"""Speculation: how long a step with drafts takes beside a plain one, and so how many drafts must be accepted to gain.

A step with k drafts gives 1 + a tokens, of which a is the number accepted: it pays off when 1 + a is more than its time
over a plain step's. Random weights accept next to nothing, so the gain of a model must be measured with that model; the
break-even a is a property of its shape and the machine.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from deepwright_core.engine import Engine, SamplingParams

from .throughput import WARM_STEPS, prompts, synchronise


@dataclass(frozen=True)
class Speculative:
    """Steps of one batch and number of drafts. accepted: of each step, on average, with these weights."""

    batch: int
    drafts: int
    milliseconds: float
    accepted: float

    def break_even(self, plain_milliseconds: float) -> float:
        """Accepted drafts a step from which on it beats plain steps of that time."""
        return self.milliseconds / plain_milliseconds - 1


def speculative(engine: Engine, batch: int, drafts: int, prompt: int, steps: int, temperature: float) -> Speculative:
    """The median step of `batch` sequences after prompts of `prompt` tokens. drafts: what the engine was made for."""
    device = engine._runner.device
    ids = [
        engine.add(ids, SamplingParams(max_tokens=1 << 20, temperature=temperature, seed=i, ignore_eos=True))
        for i, ids in enumerate(prompts(engine.model.config.vocab_size, batch, prompt))
    ]
    while len(engine._scheduler.decoding) < batch:
        engine.step()
    for _ in range(WARM_STEPS):
        engine.step()
    before = engine.stats
    synchronise(device)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    after = engine.stats
    for request in ids:
        engine.cancel(request)
    while engine.has_work:
        engine.step()
    verified = max(1, after.draft_steps - before.draft_steps)
    accepted = (after.accepted_tokens - before.accepted_tokens) / verified
    return Speculative(batch, drafts, 1e3 * statistics.median(times), accepted)
