"""Does reinforcement teach the demo model to reason? Runs the recipe for several seeds, with and without the control.

For every seed: prepare, pretrain, sft and rl as `experiment=cpu_demo` has them, then the same rl stage with the rewards
shuffled inside each group, from which nothing can be learned. Prints a table of held-out accuracy with 95 % intervals
(bootstrap over problems) and writes it as JSON. Stages that are already done are reused.

    python benchmarks/reasoning.py --seeds 0 1 2 --root runs/reasoning --json reasoning.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CONTROL = "rl.shuffle_rewards=true"


def run(root: Path, overrides: Sequence[str]) -> None:
    """The command that a user would type; its progress goes to the terminal."""
    command = ["deepwright", "run", "rl", *overrides, f"paths.root={root}"]
    print("$", " ".join(command), flush=True)
    subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=True)


def result(root: Path, shuffled: bool) -> dict[str, float]:
    """Metrics of the newest finished rl stage of a root, with or without shuffled rewards."""
    found = []
    for path in (root / "stages").glob("rl-*/result.json"):
        made_from = json.loads((path.parent / "made_from.json").read_text())
        if made_from["sections"]["rl"]["shuffle_rewards"] == shuffled:
            found.append((path.stat().st_mtime, path))
    metrics: dict[str, float] = json.loads(max(found)[1].read_text())["metrics"]
    return metrics


def row(name: str, before: str, metrics: dict[str, float]) -> dict[str, Any]:
    """One line of the table; `before` is the prefix of the figures to show."""
    figures = {key.removeprefix(before): value for key, value in metrics.items() if key.startswith(before)}
    best = next(key for key in figures if key.startswith("pass_at_") and key.split("_")[2] not in ("1",))
    return {
        "model": name,
        "greedy": (figures["greedy_accuracy"], figures["greedy_accuracy_low"], figures["greedy_accuracy_high"]),
        "pass@1": (figures["pass_at_1"], figures["pass_at_1_low"], figures["pass_at_1_high"]),
        best.replace("pass_at_", "pass@"): figures[best],
        "thinking share": figures["thinking_share"],
        "thinking tokens": figures["thinking_tokens"],
    }


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--root", type=Path, default=Path("runs/reasoning"), help="where the runs' files go")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for all runs, such as experiment=smoke")
    arguments = parser.parse_intermixed_args()
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        root = arguments.root / f"seed-{seed}"
        overrides = [f"seed={seed}", *arguments.overrides]
        run(root, overrides)
        run(root, [*overrides, CONTROL])
        learned = result(root, shuffled=False)
        rows.append({"seed": seed, **row("SFT", "before_test_", learned)})
        rows.append({"seed": seed, **row("RL", "test_", learned)})
        rows.append({"seed": seed, **row("RL, shuffled rewards", "test_", result(root, shuffled=True))})
    table = Table(title="Held-out problems, exact match, 95 % interval")
    for column in rows[0]:
        table.add_column(column)
    for each in rows:
        table.add_row(*(shown(value) for value in each.values()))
    Console(width=160).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
