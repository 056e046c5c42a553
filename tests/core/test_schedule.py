"""Learning-rate schedules: the values at the joints."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deepwright_core.errors import RequestError
from deepwright_core.registry import Registry


def factors(registry: Registry, total: int, **options: Any) -> list[float]:
    schedule = registry.build("schedule", options, total)
    return [schedule(step) for step in range(total)]


def test_warm_up_stable_and_cosine_decay(registry: Registry) -> None:
    have = factors(registry, 100, name="wsd", warmup_share=0.04, decay_share=0.2, final=0.1, decay="cosine")
    assert have[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert have[5:80] == [1.0] * 75
    assert have[80] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 20)) / 2) and have[80] < 1.0
    assert have[89] == pytest.approx(0.55)  # half-way: 10 of the 20 steps are done
    assert have[99] == pytest.approx(0.1)
    assert have[79:] == sorted(have[79:], reverse=True)


def test_linear_decay(registry: Registry) -> None:
    have = factors(registry, 10, name="wsd", warmup_share=0, decay_share=0.5, final=0.0, decay="linear")
    assert have == pytest.approx([1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_without_decay_it_stays_at_the_peak(registry: Registry) -> None:
    assert factors(registry, 5, name="wsd", warmup_share=0, decay_share=0) == [1.0] * 5


@pytest.mark.parametrize("total", [1, 2, 3, 7, 33])
def test_short_runs_stay_between_zero_and_one(registry: Registry, total: int) -> None:
    have = factors(registry, total, name="wsd")
    assert all(0 < factor <= 1 for factor in have)
    assert have[-1] == pytest.approx(0.05) or total * 0.3 < 1


def test_shares_that_exceed_the_run_are_refused(registry: Registry) -> None:
    with pytest.raises(RequestError, match=r"warmup_share 0\.6 and decay_share 0\.5 add up to more than the whole run"):
        registry.parse("schedule", {"name": "wsd", "warmup_share": 0.6, "decay_share": 0.5})


def test_constant_after_a_linear_warm_up(registry: Registry) -> None:
    assert factors(registry, 5, name="constant", warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors(registry, 3, name="constant") == [1.0] * 3
