"""The table at the end of a run: what each stage took, what it gained, where to look, how to go on."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .rich_progress import duration, scaled
from .runner import Outcome

COLUMNS = ("stage", "", "time", "tokens", "main metric", "before → after", "FLOPs", "energy")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def cells(outcome: Outcome) -> tuple[str, ...]:
    """One row. A reused stage shows what it took when it was made."""
    label, before, after = outcome.result.headline
    joules = outcome.finished.record.get("joules", outcome.joules)
    measured = outcome.finished.record.get("joules_measured", outcome.measured)
    return (
        outcome.stage,
        "reused" if outcome.reused else "done",
        duration(outcome.finished.seconds),
        scaled(outcome.result.tokens) if outcome.result.tokens else "–",
        label or "–",
        f"{_number(before)} → {_number(after)}" if label else "–",
        scaled(outcome.result.flops) if outcome.result.flops else "–",
        f"{'' if measured else '~'}{scaled(joules, 'J')}",
    )


def totals(outcomes: Sequence[Outcome], seconds: float, cpu_watts: float) -> str:
    """One line below the table."""
    joules = sum(o.finished.record.get("joules", o.joules) for o in outcomes)
    measured = all(o.finished.record.get("joules_measured", o.measured) for o in outcomes)
    how = "measured by the processor" if measured else f"estimated at {cpu_watts:g} W (run.cpu_watts)"
    flops = sum(o.result.flops for o in outcomes)
    return (
        f"This run took {duration(seconds)}. All stages together: "
        f"{duration(sum(o.finished.seconds for o in outcomes))}, {scaled(flops, 'FLOP')}, "
        f"{joules / 3600:.2g} Wh ({how})."
    )


def learned(outcomes: Sequence[Outcome]) -> list[tuple[str, str]]:
    """(stage, sentence) lines: what each stage says of itself."""
    return [(outcome.stage, note) for outcome in outcomes for note in outcome.result.notes]


def places(outcomes: Sequence[Outcome], root: Path, links: Mapping[str, str]) -> list[tuple[str, str]]:
    """(what, where) lines: directories, the tracker's and the workflow's pages, and the next command."""
    lines = [(f"{o.stage}", str(o.directory)) for o in outcomes]
    lines += list(links.items())
    model = final_model(outcomes)
    if model is not None:
        lines.append(("chat", f"deepwright serve {model[0]}"))
    return lines


def _is_model(path: Path) -> bool:
    return (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file()


def final_model(outcomes: Sequence[Outcome]) -> tuple[Path, Outcome] | None:
    """The model that the last stage made or used, and the stage that made it; None when there is none."""
    makers = {o.directory / relative: o for o in outcomes for relative in o.result.outputs.values()}
    for outcome in reversed(outcomes):
        made = [outcome.directory / relative for relative in outcome.result.outputs.values()]
        for path in [*made, *outcome.inputs.values()]:
            if _is_model(path) and path in makers:
                return path, makers[path]
    return None


def table(
    outcomes: Sequence[Outcome], seconds: float, cpu_watts: float, root: Path, links: Mapping[str, str]
) -> RenderableType:
    """For the terminal."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        rows.add_column(column, justify="left" if column in ("stage", "", "main metric") else "right")
    for outcome in outcomes:
        rows.add_row(*(Text(cell) for cell in cells(outcome)))
    parts: list[RenderableType] = [rows, Text("")]
    for lines in (learned(outcomes), places(outcomes, root, links)):
        grid = Table.grid(padding=(0, 2))
        for what, text in lines:
            grid.add_row(Text(what, style="bold"), Text(text, overflow="fold"))
        parts += [grid, Text("")] if lines else []
    return Group(*parts, Text(totals(outcomes, seconds, cpu_watts)))


def markdown(
    outcomes: Sequence[Outcome], seconds: float, cpu_watts: float, root: Path, links: Mapping[str, str]
) -> str:
    """The same for the workflow's and the tracker's pages."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(outcome))} |" for outcome in outcomes]
    lines += ["", *(f"- {stage}: {note}" for stage, note in learned(outcomes))]
    lines += ["", totals(outcomes, seconds, cpu_watts), ""]
    for what, place in places(outcomes, root, links):
        lines.append(f"- {what}: {place}" if place.startswith("http") else f"- {what}: `{place}`")
    return "\n".join(lines)


def show(renderable: RenderableType, console: Console | None = None) -> None:
    """Print to standard output, wide enough that nothing is cut when that is a file."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=160)
    with contextlib.suppress(BrokenPipeError):  # nobody reads it (`| head`): the work is done all the same
        console.print()
        console.print(renderable)
