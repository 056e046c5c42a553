"""Does training in FP8 lose anything, and what does it gain? The same pretraining twice, in bf16 and in FP8.

    python benchmarks/fp8_training.py [--steps 500] [--width 1024] [--prepared DIRECTORY] [--json fp8.json]

Both runs are the stage `pretrain` itself, from the same seed on the same batches: text of the Python installation,
unless `--prepared` names the directory of another finished `prepare` stage. Printed are training loss (a mean over the
last tenth of the steps), held-out loss, the relative difference of each, and tokens a second. DeepSeek-V3 keeps the
difference below 0.25 % (report, section 3.3 and appendix B.1). Held-out loss is taken with bf16 products in both runs:
it compares the weights. Leaves out several GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
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


def model(width: int, layers: int, experts: int) -> dict[str, Any]:
    """DeepSeek-V3's shape at a given width: both latents, a dense first layer, shared and routed experts."""
    return {
        "hidden_size": width,
        "layers": layers,
        "intermediate_size": 3 * width,
        "first_dense_layers": 1,
        "max_positions": 4096,
        "tied_head": True,
        "init_std": 0.006 * math.sqrt(7168 / width),
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
    options: argparse.Namespace, plugins: Plugins, precision: str, prepared: Path, root: Path
) -> dict[str, float]:
    """Pretrain once; the figures to compare."""
    config = {
        "seed": options.seed,
        "precision": precision,
        "model": model(options.width, options.layers, options.experts),
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
    directory = root / precision
    result = stage(plugins, "pretrain", config, directory, inputs)
    steps = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    seconds = [step["step_seconds"] for step in steps if "step_seconds" in step]
    return {
        "training_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "held_out_bits_per_byte": result.metrics["validation_bits_per_byte"],
        "tokens_per_second": options.batch * options.sequence / statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The same pretraining in bf16 and in FP8.")
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
    parser.add_argument("--seed", type=int, default=0)
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
                "seed": options.seed,
                "data": {"name": "stdlib", "max_bytes": 40_000_000},
                "tokenizer": {"name": "bpe", "vocab_size": 8192},
                "task": {"name": "arithmetic"},
                "prepare": {"problem_share": 0.0},
            }
            stage(plugins, "prepare", config, prepared, {})
        results = {}
        for precision in ("bf16", "fp8"):
            print(precision, flush=True)
            results[precision] = train(options, plugins, precision, prepared, root)

    device = torch.cuda.get_device_name() if gpu else "CPU"
    print(f"\n{device}, {options.steps} steps of {options.batch} x {options.sequence} tokens, width {options.width}")
    print(f"{'':26}{'bf16':>12}{'fp8':>12}{'difference':>12}")
    for name, bf16 in results["bf16"].items():
        fp8 = results["fp8"][name]
        print(f"{name.replace('_', ' '):26}{bf16:12,.4f}{fp8:12,.4f}{fp8 / bf16 - 1:+12.2%}")
    worst = max(
        abs(results["fp8"][name] / results["bf16"][name] - 1) for name in ("training_loss", "held_out_bits_per_byte")
    )
    print(f"largest difference of a loss {worst:.2%}; {'within' if worst <= LIMIT else 'beyond'} {LIMIT:.2%}")
    if options.json:
        options.json.write_text(
            json.dumps({"device": device, "options": vars(options), "results": results}, indent=2, default=str)
        )


if __name__ == "__main__":
    main()
