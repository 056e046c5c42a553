"""Is a version good enough to go live: its figures on held-out problems, against thresholds and the live version's.

Both are asked the same problems, so that a difference is the versions' and not the problems'. Left out: statistics of
small samples; with 32 problems one answer is 3 points, so `problems` belongs to the threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from .asking import Answered, Asking, Figures


class Check(Asking):
    """How a version is asked before it goes live, and what it must reach."""

    problems: int = Field(64, ge=1, description="held-out test problems to ask (fewer if there are fewer)")
    least_accuracy: float = Field(0.0, ge=0, le=1, description="share of right answers that it must reach")
    accuracy_lost: float = Field(0.05, ge=0, le=1, description="most that its accuracy may lie below the live one's")
    well_formed_lost: float = Field(
        0.05, ge=0, le=1, description="the same for answers that end of themselves with something said"
    )
    slower: float = Field(2.0, ge=1, description="times the live one's latency that its own may be at most")
    latency: float = Field(60.0, gt=0, description="seconds that an answer may take on average, whatever is live")


@dataclass(frozen=True)
class Verdict:
    """`problems` are sentences; without one, the candidate may go live. `live` is None when nothing was."""

    candidate: Figures
    live: Figures | None
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the candidate may go live."""
        return not self.problems


def judge(
    candidate: Sequence[Answered], live: Sequence[Answered] | None, check: Check, *, compare: bool = True
) -> Verdict:
    """The verdict on a candidate's answers; `live` are the live version's to the same problems.

    compare: whether being worse than the live version counts.
    """
    new = Figures.of(candidate)
    old = None if live is None else Figures.of(live)
    problems = []
    broken = [answer for answer in candidate if answer.error]
    if broken:
        # One is too many: logits that are not finite, or a server that breaks off, do not get better live.
        problems.append(f"{len(broken)} of {new.answers} problems got no whole answer. The first: {broken[0].error}")
    if new.accuracy < check.least_accuracy:
        problems.append(f"Its accuracy is {new.accuracy:.1%}; least_accuracy is {check.least_accuracy:.1%}.")
    if new.latency > check.latency:
        problems.append(f"An answer takes {new.latency:.2f} s on average; latency allows {check.latency:g} s.")
    if old is not None and compare:
        if new.accuracy < old.accuracy - check.accuracy_lost:
            problems.append(
                f"Its accuracy is {new.accuracy:.1%}, the live version's {old.accuracy:.1%} on the same problems; "
                f"accuracy_lost allows {check.accuracy_lost:.1%} less."
            )
        if new.well_formed < old.well_formed - check.well_formed_lost:
            problems.append(
                f"{new.well_formed:.1%} of its answers are well formed, {old.well_formed:.1%} of the live version's; "
                f"well_formed_lost allows {check.well_formed_lost:.1%} less."
            )
        if new.latency > old.latency * check.slower:
            problems.append(
                f"An answer takes {new.latency:.2f} s on average, the live version's {old.latency:.2f} s; "
                f"slower allows {check.slower:g} times as much."
            )
    return Verdict(new, old, tuple(problems))
