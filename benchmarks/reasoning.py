"""Does reinforcement teach the demo model to reason? Runs the recipe for several seeds, with and without the control.

For every seed: prepare, pretrain, sft and rl as `experiment=cpu_demo` has them, then the same rl stage with the rewards
shuffled inside each group, from which nothing can be learned. Prints a table of held-out accuracy with 95 % intervals
(bootstrap over problems), writes it as JSON, and plots reward and thinking over the steps. Stages that are already done
are reused.

    python benchmarks/reasoning.py --seeds 0 1 2 --root runs/reasoning --json reasoning.json --plot reasoning.png
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


def finished(root: Path, shuffled: bool) -> Path:
    """Directory of the newest finished rl stage of a root, with or without shuffled rewards."""
    found = []
    for path in (root / "stages").glob("rl-*/result.json"):
        made_from = json.loads((path.parent / "made_from.json").read_text())
        if made_from["sections"]["rl"]["shuffle_rewards"] == shuffled:
            found.append((path.stat().st_mtime, path))
    return max(found)[1].parent


def result(directory: Path) -> dict[str, float]:
    """Final metrics of a stage."""
    metrics: dict[str, float] = json.loads((directory / "result.json").read_text())["metrics"]
    return metrics


def curve(directory: Path, metric: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric as the tracker has them."""
    from mlflow import MlflowClient

    reference = json.loads((directory / "tracking.json").read_text())
    history = MlflowClient(reference["uri"]).get_metric_history(reference["run_id"], metric)
    points = sorted((point.step, point.value) for point in history)
    return [step for step, _ in points], [value for _, value in points]


def plot(runs: Sequence[tuple[int, Path, Path]], path: Path) -> None:
    """Training accuracy and thinking over the steps: each seed, and its control with shuffled rewards."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    panels = {"accuracy": "share of right answers", "thinking_tokens": "tokens of thinking"}
    for axis, (metric, label) in zip(axes, panels.items(), strict=True):
        for seed, learned, control in runs:
            name = f"seed {seed}" if len(runs) > 1 else None
            axis.plot(*curve(learned, metric), color="C0", alpha=0.9 - 0.25 * (seed % 3), label=name)
            axis.plot(*curve(control, metric), color="C7", alpha=0.9 - 0.25 * (seed % 3), linestyle="--")
        axis.set(xlabel="GRPO step", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].plot([], [], color="C7", linestyle="--", label="rewards shuffled")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=140)


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
    parser.add_argument("--plot", type=Path, help="draw the curves here (PNG or SVG)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for all runs, such as experiment=smoke")
    arguments = parser.parse_intermixed_args()
    rows: list[dict[str, Any]] = []
    runs: list[tuple[int, Path, Path]] = []
    for seed in arguments.seeds:
        root = arguments.root / f"seed-{seed}"
        overrides = [f"seed={seed}", *arguments.overrides]
        run(root, overrides)
        run(root, [*overrides, CONTROL])
        learned, control = finished(root, shuffled=False), finished(root, shuffled=True)
        runs.append((seed, learned, control))
        rows.append({"seed": seed, **row("SFT", "before_test_", result(learned))})
        rows.append({"seed": seed, **row("RL", "test_", result(learned))})
        rows.append({"seed": seed, **row("RL, shuffled rewards", "test_", result(control))})
    table = Table(title="Held-out problems, exact match, 95 % interval")
    for column in rows[0]:
        table.add_column(column)
    for each in rows:
        table.add_row(*(shown(value) for value in each.values()))
    Console(width=160).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    if arguments.plot:
        plot(runs, arguments.plot)


if __name__ == "__main__":
    main()
