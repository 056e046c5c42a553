"""What a promotion found, as people and the registry read it: before and after side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from deepwright_serve.asking import Figures

if TYPE_CHECKING:
    from .promotion import Promotion

Row = tuple[str, Callable[[Figures], str]]
ROWS: tuple[Row, ...] = (
    ("right answers", lambda figures: f"{figures.accuracy:.1%}"),
    ("well-formed answers", lambda figures: f"{figures.well_formed:.1%}"),
    ("cut off at max_tokens", lambda figures: f"{figures.cut_off:.1%}"),
    ("failed", lambda figures: f"{figures.failed:.1%}"),
    ("first token", lambda figures: f"{1000 * figures.first_token:.0f} ms"),
    ("between tokens", lambda figures: f"{1000 * figures.token_seconds:.1f} ms"),
    ("whole answer", lambda figures: f"{figures.latency:.2f} s"),
)


def markdown(promotion: Promotion) -> str:
    """A table with a column for what was live and one for the candidate; below it what came of it, and why."""
    lines = [f"**{promotion.candidate}: {promotion.state}**", ""]
    verdict = promotion.verdict
    if verdict is None:
        return "\n".join([*lines, promotion.message])
    lines += [f"- {problem}" for problem in verdict.problems] or [promotion.message]
    before = f"before: {promotion.live}" if promotion.live else "before"
    lines += ["", f"| {verdict.candidate.answers} held-out problems | {before} | {promotion.candidate} |"]
    lines.append("|---|---|---|")
    for label, shown in ROWS:
        old = "–" if verdict.live is None else shown(verdict.live)
        lines.append(f"| {label} | {old} | {shown(verdict.candidate)} |")
    return "\n".join(lines)


def tags(promotion: Promotion) -> dict[str, str]:
    """The same for the version's page in the registry."""
    facts = {
        "check": promotion.state,
        "check.why": promotion.message,
        "check.time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "check.against": promotion.live or "nothing",
    }
    if promotion.verdict is not None:
        figures = {"candidate": promotion.verdict.candidate, "live": promotion.verdict.live}
        for which, of in figures.items():
            if of is not None:
                facts |= {f"check.{which}.{key}": f"{getattr(of, key):.6g}" for key in ("accuracy", "latency")}
    return facts
