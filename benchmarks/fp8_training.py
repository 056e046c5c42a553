"""Does training in FP8 lose anything, and what does it gain? The same pretraining in bf16 and in FP8.

    python benchmarks/fp8_training.py [--steps 500] [--width 1024] [--seeds 0 1] [--prepared DIRECTORY] [--json FILE]

All runs are the stage `pretrain` itself; those of one seed see the same batches: text of the Python installation,
unless `--prepared` names the directory of another finished `prepare` stage. Printed are training loss (a mean over the
last tenth of the steps), held-out loss, the relative difference of each from bf16, and tokens a second. DeepSeek-V3
keeps the difference below 0.25 % (report, section 3.3 and appendix B.1). A short run at a high learning rate differs
from itself by more than that when anything is rounded otherwise, so a control says how much: bf16 again, from first
weights that are a millionth larger. Neither bf16 run is better than the other, so FP8 is compared with their mean as
well. Held-out loss is taken with bf16 products in all runs: it compares the weights.
Leaves out several GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deepwright_core.config import validate
from deepwright_core.plugins import Plugins, installed
from deepwright_core.stage import Stage, StageContext
from deepwright_core.tracking import JsonlTracker

LIMIT = 0.0025
HEAD = 64
RUNS = {"bf16": ("bf16", 1.0), "control": ("bf16", 1.0 + 1e-6), "fp8": ("fp8", 1.0)}
"""Precision of each run, and what its first weights are multiplied by."""
LOSSES = ("training_loss", "held_out_bits_per_byte")


def model(width: int, layers: int, experts: int, scale: float) -> dict[str, Any]:
    """DeepSeek-V3's shape at a given width: both latents, a dense first layer, shared and routed experts.

    scale: of the first weights."""
    return {
        "hidden_size": width,
        "layers": layers,
        "intermediate_size": 3 * width,
        "first_dense_layers": 1,
        "max_positions": 4096,
        "tied_head": True,
        "init_std": scale * 0.006 * math.sqrt(7168 / width),
        "attention": {
            "name": "mla",
            "heads": width // HEAD,
            "q_lora_rank": width // 2,
            "kv_lora_rank": width // 4,
            "qk_nope_head_dim": HEAD,
            "qk_rope_head_dim": HEAD // 2,
            "v_head_dim": HEAD,
        },
        "ffn": {
            "name": "moe",
            "experts": experts,
            "top_k": 4,
            "shared_experts": 1,
            "intermediate_size": width // 2,
            "router": {"name": "noaux_tc", "scaling": 2.5},
        },
    }


class Told:
    """Shows a line now and then."""

    def __init__(self) -> None:
        self._last = 0.0

    def start(self, description: str, total: int, completed: int = 0) -> None:
        self._description, self._total = description, total

    def advance(self, completed: int, note: str = "") -> None:
        if time.perf_counter() - self._last > 10 or completed == self._total:
            self._last = time.perf_counter()
            print(f"  {self._description} {completed}/{self._total}  {note}", flush=True)


def stage(plugins: Plugins, name: str, config: dict[str, Any], directory: Path, inputs: dict[str, Path]) -> Any:
    """Run one stage as the workflow would, without it."""
    sections = validate(plugins.registry, config)
    built: Stage = plugins.registry.get("stage", name).build(sections[name])
    directory.mkdir(parents=True, exist_ok=True)
    tracker = JsonlTracker(directory / "metrics.jsonl")
    return built.run(sections, StageContext(directory, tracker, Told(), plugins.registry, plugins.hook, inputs))


def train(
    options: argparse.Namespace, plugins: Plugins, name: str, seed: int, prepared: Path, root: Path
) -> dict[str, float]:
    """Pretrain once; the figures to compare."""
    precision, scale = RUNS[name]
    config = {
        "seed": seed,
        "precision": precision,
        "model": model(options.width, options.layers, options.experts, scale),
        "optimizer": {"name": options.optimizer},
        "schedule": {"name": "wsd"},
        "pretrain": {
            "steps": options.steps,
            "lr": options.lr,
            "batch_size": options.batch,
            "sequence_length": options.sequence,
            "evaluate_every": 0,
            "save_every": 0,
        },
    }
    inputs = {"tokenizer": prepared / "tokenizer", "corpus": prepared / "corpus"}
    directory = root / f"{name}-{seed}"
    result = stage(plugins, "pretrain", config, directory, inputs)
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    seconds = [step["step_seconds"] for step in steps if "step_seconds" in step]
    shutil.rmtree(directory)  # checkpoints of many runs would fill a disk
    return {
        "training_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "held_out_bits_per_byte": result.metrics["validation_bits_per_byte"],
        "tokens_per_second": options.batch * options.sequence / statistics.median(seconds),
    }


def difference(of: list[float], base: list[float]) -> tuple[float, str]:
    """The mean relative difference over seeds, and as it is shown, with its standard error where there are several."""
    differences = [value / other - 1 for value, other in zip(of, base, strict=True)]
    mean, shown = statistics.fmean(differences), ""
    if len(differences) > 1:
        shown = f" ± {statistics.stdev(differences) / math.sqrt(len(differences)):.2%} (standard error)"
    return mean, f"{mean:+.2%}{shown}"


def report(results: dict[int, dict[str, dict[str, float]]]) -> None:
    """Print a table for each seed, and over all seeds the mean differences."""
    for seed, runs in results.items():
        print(f"\nseed {seed:<21}" + "".join(f"{name:>18}" for name in runs))
        for figure, bf16 in runs["bf16"].items():
            cells = [
                f"{run[figure]:,.0f}"
                if figure not in LOSSES
                else f"{run[figure]:.4f}" + (f" ({run[figure] / bf16 - 1:+.2%})" if name != "bf16" else "")
                for name, run in runs.items()
            ]
            print(f"{figure.replace('_', ' '):26}" + "".join(f"{cell:>18}" for cell in cells))
    print()
    for figure in LOSSES:
        bf16, control, fp8 = ([runs[name][figure] for runs in results.values()] for name in RUNS)
        both = [statistics.fmean(pair) for pair in zip(bf16, control, strict=True)]
        for what, of, base in (
            ("control from bf16", control, bf16),
            ("fp8 from bf16", fp8, bf16),
            ("fp8 from the mean of both bf16 runs", fp8, both),
        ):
            mean, shown = difference(of, base)
            bound = f"; {'within' if abs(mean) <= LIMIT else 'beyond'} {LIMIT:.2%}" if base is both else ""
            print(f"{figure.replace('_', ' '):26}{what:38}{shown}{bound}")


def main() -> None:
    parser = argparse.ArgumentParser(description="The same pretraining in bf16, in bf16 again and in FP8.")
    gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, default=500 if gpu else 60)
    parser.add_argument(
        "--width", type=int, default=1024 if gpu else 128, help="hidden size; the other sizes follow from it"
    )
    parser.add_argument("--layers", type=int, default=12 if gpu else 3)
    parser.add_argument("--experts", type=int, default=32 if gpu else 8)
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--sequence", type=int, default=1024 if gpu else 128, help="tokens a row")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--prepared", type=Path, help="directory of a finished prepare stage (default: make one)")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()

    plugins = installed()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepared = options.prepared
        if prepared is None:
            prepared = root / "prepare"
            config = {
                "seed": 0,
                "data": {"name": "stdlib", "max_bytes": 40_000_000},
                "tokenizer": {"name": "bpe", "vocab_size": 8192},
                "task": {"name": "arithmetic"},
                "prepare": {"problem_share": 0.0},
            }
            stage(plugins, "prepare", config, prepared, {})
        results: dict[int, dict[str, dict[str, float]]] = {}
        for seed in options.seeds:
            results[seed] = {}
            for name in RUNS:
                print(f"seed {seed}, {name}", flush=True)
                results[seed][name] = train(options, plugins, name, seed, prepared, root)
                print("  " + ", ".join(f"{k.replace('_', ' ')} {v:,.4f}" for k, v in results[seed][name].items()))

    device = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"\n{device}, {options.steps} steps of {options.batch} x {options.sequence} tokens, width {options.width}")
    report(results)
    if options.json:
        options.json.write_text(
            json.dumps({"device": device, "options": vars(options), "results": results}, indent=2, default=str)
        )


if __name__ == "__main__":
    main()
