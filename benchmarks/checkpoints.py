"""Time and memory of importing and exporting a checkpoint, with transformers loading and saving the same beside it.

    python benchmarks/checkpoints.py [--size-gb 2] [--directory DIR] [--json checkpoints.json]

A DeepSeek-V3 of random weights is written once (`--size-gb` in bf16); then each conversion runs in a process of its
own. Memory is the process's peak less what it held after its imports; pages of mapped files count as long as they are
held. Free space of about four times the size is needed. Times include the disk: run twice and compare.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from deepwright_core.huggingface import export_directory, import_directory
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import estimate
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.plugins import installed
from deepwright_core.registry import parse

CONFIG: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "first_dense_layers": 1,
    "max_positions": 4096,
    "attention": {
        "name": "mla",
        "heads": 16,
        "q_lora_rank": 512,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    "ffn": {"name": "moe", "experts": 64, "top_k": 6, "shared_experts": 1, "intermediate_size": 512},
}


def config_of(size_gb: float) -> ModelConfig:
    """As many layers as make about this many GB in bf16."""
    registry = installed().registry
    sizes = [
        2 * estimate(registry, parse(ModelConfig, {**CONFIG, "layers": n}, "model", registry)).parameters_total
        for n in (2, 3)
    ]
    layers = max(2, round(2 + (size_gb * 1e9 - sizes[0]) / (sizes[1] - sizes[0])))
    config: ModelConfig = parse(ModelConfig, {**CONFIG, "layers": layers}, "model", registry)
    return config


def make(directory: Path, size_gb: float) -> None:
    """The random model, stored in bf16."""
    model = build_model(installed().registry, config_of(size_gb), seed=0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    save_model(model, directory)


def peak_bytes() -> int:
    """The most memory that this process has held (its own, where `ru_maxrss` would begin with its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def child(work: str, source: Path, destination: Path) -> dict[str, float]:
    """One conversion: its seconds, and the memory that it took."""
    registry = installed().registry
    if work == "transformers":
        from transformers import AutoModelForCausalLM
    before = peak_bytes()
    began = time.perf_counter()
    if work == "transformers":
        AutoModelForCausalLM.from_pretrained(source).save_pretrained(destination)
    elif work == "import":
        import_directory(source, destination, registry)
    else:
        export_directory(source, destination, registry, dtype=work)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_bytes": peak_bytes() - before}


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--child", nargs=3, metavar=("WORK", "SOURCE", "DESTINATION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work, source, destination = arguments.child
        print(json.dumps(child(work, Path(source), Path(destination))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        root = Path(folder)
        make(root / "ours", arguments.size_gb)
        steps = (
            ("export bf16", "bf16", "ours", "published"),
            ("import bf16", "import", "published", "in"),
            ("export FP8", "fp8", "ours", "published-fp8"),
            ("import FP8 (to bf16)", "import", "published-fp8", "in"),
            ("transformers: load and save", "transformers", "published", "resaved"),
        )
        rows = []
        print(f"{'':<28} {'read GB':>8} {'written GB':>11} {'seconds':>8} {'GB/s written':>13} {'peak GB':>8}")
        for label, work, source, destination in steps:
            shutil.rmtree(root / destination, ignore_errors=True)
            command = [sys.executable, __file__, "--child", work, str(root / source), str(root / destination)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{label} failed:\n{done.stderr[-2000:]}")
            measured = json.loads(done.stdout.splitlines()[-1])
            read, written = size_of(root / source), size_of(root / destination)
            rows.append({"what": label, "read_bytes": read, "written_bytes": written, **measured})
            print(
                f"{label:<28} {read / 1e9:>8.2f} {written / 1e9:>11.2f} {measured['seconds']:>8.1f} "
                f"{written / 1e9 / measured['seconds']:>13.2f} {measured['peak_bytes'] / 1e9:>8.2f}",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
