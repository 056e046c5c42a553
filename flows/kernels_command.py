"""`deepwright kernels`: every operator, what would run it here, why other backends cannot, and whether they agree."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .cli_plugins import block_option

if TYPE_CHECKING:
    import torch

    from deepwright_kernels.self_test import Outcome


@dataclass(frozen=True)
class Operator:
    """An operator on a device. runs: the backend that `chosen` comes to, for the inputs of the self-test.

    reasons: backend -> why it cannot run, None where it can. tested: backend -> what its self-test gave.
    """

    name: str
    chosen: str
    runs: str
    by_size: bool
    reasons: dict[str, str | None]
    tested: dict[str, Outcome]


@click.command(
    short_help="The operators' backends, what runs here, and a test of them.",
    epilog="""\b
Examples:
  deepwright kernels
  deepwright kernels --self-test
  deepwright kernels rms_norm rotary --self-test --device cpu
  deepwright kernels --json

`deepwright run TARGET kernels.rms_norm=reference` chooses a backend for a run, `kernels=reference` one for all.""",
)
@click.argument("operators", nargs=-1, metavar="[OPERATOR]...")
@click.option("--self-test", is_flag=True, help="Run every backend that can, and hold it against the reference.")
@click.option("--device", "asked", type=click.Choice(["cpu", "cuda"]), help="Default: the GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, on standard output.")
@block_option
def kernels(
    operators: tuple[str, ...], self_test: bool, asked: str | None, as_json: bool, block: tuple[str, ...]
) -> None:
    """List the operators (all, or those named): the backends of each, which one runs, and why others cannot.

    With --self-test each backend computes small inputs and is held against the reference, gradients included. Exit
    status 1 when one of them is wrong.
    """
    import torch

    from deepwright_core.errors import RequestError, WorkError, did_you_mean
    from deepwright_kernels import dispatch

    from .cli_plugins import load_plugins

    if asked == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device cuda: torch finds no GPU on this machine; `deepwright doctor` says what it has.")
    device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    load_plugins(block)  # they may add backends
    known = dispatch.operators()
    unknown = [name for name in operators if name not in known]
    if unknown:
        raise RequestError([f"There is no operator '{name}'. {did_you_mean(name, known)}" for name in unknown])
    names = list(dict.fromkeys(operators)) or sorted(known)
    tested = _test(names, device) if self_test else {}
    found = [_look(name, device, tested.get(name, {})) for name in names]
    wrong = [o for operator in found for o in operator.tested.values() if o.passed is False]
    if as_json:
        click.echo(json.dumps(_as_data(found, device, self_test), indent=1, ensure_ascii=False))
    else:
        _show(found, device, self_test)
    if wrong:
        raise WorkError("The self-test failed for " + "; ".join(map(_sentence, wrong)) + ".")


def _look(name: str, device: torch.device, tested: dict[str, Outcome]) -> Operator:
    from deepwright_kernels import dispatch
    from deepwright_kernels.self_test import arguments_of

    arguments = arguments_of(name, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dispatch.BackendWarning)  # the listing says it
        runs = dispatch.backend_for(name, *arguments)
    by_size = dispatch.depends_on_arguments(name, device)
    return Operator(name, dispatch.choices()[name], runs, by_size, dispatch.reasons(name, *arguments), tested)


def _test(names: Sequence[str], device: torch.device) -> dict[str, dict[str, Outcome]]:
    """Operator -> backend -> outcome, with a line of progress on standard error."""
    from deepwright_kernels import self_test

    from .rich_progress import display

    shown = display()
    shown.stage("kernels")
    shown.start("self-test", len(names))
    tested: dict[str, dict[str, Outcome]] = {}
    try:
        for done, name in enumerate(names):
            shown.advance(done, name)
            tested[name] = {outcome.backend: outcome for outcome in self_test.run(name, device)}
        shown.advance(len(names), "done")
    finally:
        shown.close()
    return tested


def _sentence(outcome: Outcome) -> str:
    what = outcome.failure or f"the error is {outcome.error:.1e} and {outcome.tolerance:.0e} is allowed"
    return f"{outcome.operator} with {outcome.backend}: {what}"


def _as_data(found: Sequence[Operator], device: torch.device, self_test: bool) -> dict[str, Any]:
    import torch

    def backend(operator: Operator, name: str) -> dict[str, Any]:
        data: dict[str, Any] = {"name": name, "reason": operator.reasons[name]}
        outcome = operator.tested.get(name)
        if outcome is not None and outcome.passed is not None:
            data["self_test"] = {
                "passed": outcome.passed,
                "error": outcome.error,
                "tolerance": outcome.tolerance,
                "milliseconds": outcome.milliseconds,
                "failure": outcome.failure,
            }
        return data

    listing: dict[str, Any] = {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "operators": [
            {
                "name": operator.name,
                "chosen": operator.chosen,
                "runs": operator.runs,
                "depends_on_sizes": operator.by_size,
                "backends": [backend(operator, name) for name in operator.reasons],
            }
            for operator in found
        ],
    }
    if self_test:
        outcomes = [outcome for operator in found for outcome in operator.tested.values()]
        listing["passed"] = all(outcome.passed is not False for outcome in outcomes)
    return listing


def _show(found: Sequence[Operator], device: torch.device, self_test: bool) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    console.print(f"Device: {name}, torch {torch.__version__}", highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("operator", "backend", "here"):
        table.add_column(column, no_wrap=column != "here")
    if self_test:
        for column in ("self-test", "error", "allowed", "time"):
            table.add_column(column, no_wrap=True, justify="left" if column == "self-test" else "right")
    for operator in found:
        for number, (backend, reason) in enumerate(operator.reasons.items()):
            row = ["" if number else operator.name, backend, _state(operator, backend, reason)]
            table.add_row(*map(Text, row + (_cells(operator.tested[backend]) if self_test else [])))
    console.print(table)
    if any(operator.by_size for operator in found):
        console.print(
            "* Sizes decide: this one for the small inputs of the self-test; others may be faster for larger ones.",
            highlight=False,
            markup=False,
        )


def _state(operator: Operator, backend: str, reason: str | None) -> str:
    if reason is not None:
        return f"cannot run: {reason}"
    if backend != operator.runs:
        return "can be chosen"
    return "runs" + (" *" if operator.by_size else "") + (", chosen" if operator.chosen != "auto" else "")


def _cells(outcome: Outcome) -> list[str]:
    if outcome.passed is None:
        return ["", "", "", ""]
    if outcome.failure is not None:
        return ["FAILED", outcome.failure[:80], "", ""]
    milliseconds = outcome.milliseconds or 0.0
    time = f"{milliseconds:.1f} ms" if milliseconds >= 1 else f"{milliseconds * 1e3:.0f} µs"
    verdict = "passed" if outcome.passed else "FAILED"
    return [verdict, f"{outcome.error:.1e}", f"{outcome.tolerance:.0e}", time]
