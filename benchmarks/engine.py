"""Decode speed of the generation engine: tokens a second by batch size, with random weights.

    python benchmarks/engine.py [--device cuda] [--batches 1 8 64 192] [--json engine.json]

Each row generates `--tokens` tokens for every sequence after a prompt of `--prompt` tokens. Prefill is timed apart
(the first step); the rest is decode, scheduling and sampling included: what a rollout waits for.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.plugins import installed

# Sizes of the model that the demonstration trains.
DEMO: dict[str, Any] = {  # conf/model/tiny.yaml with the demo's vocabulary
    "vocab_size": 1024,
    "hidden_size": 128,
    "layers": 3,
    "intermediate_size": 256,
    "first_dense_layers": 1,
    "max_positions": 512,
    "tied_head": True,
    "init_std": 0.05,
    "attention": {"name": "mla"},
    "ffn": {"name": "moe"},
}


def measure(
    model: Transformer, batch: int, prompt: int, tokens: int, params: SamplingParams, repeats: int
) -> dict[str, float]:
    """Generate for `batch` sequences, once to warm up and then `repeats` times; the fastest counts."""
    draw = random.Random(0)
    vocabulary = model.config.vocab_size
    prefill = decode = float("inf")
    engine = Engine(model, 0, max_batch=batch, max_prefill_tokens=max(8192, batch * prompt))
    for repeat in range(1 + repeats):
        for seed in range(batch):
            ids = [draw.randrange(vocabulary) for _ in range(prompt)]
            engine.add(ids, SamplingParams(**{**vars(params), "seed": seed, "max_tokens": tokens, "ignore_eos": True}))
        start = time.perf_counter()
        engine.step()
        prefilled = time.perf_counter()
        while engine.has_work:
            engine.step()
        end = time.perf_counter()
        if repeat:
            prefill, decode = min(prefill, prefilled - start), min(decode, end - prefilled)
    return {
        "batch": batch,
        "prefill_tokens_per_second": batch * prompt / prefill,
        "decode_tokens_per_second": batch * (tokens - 1) / decode,
        "step_milliseconds": 1000 * decode / (tokens - 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 192])
    parser.add_argument("--prompt", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--attention", default="mla", help="mla or gqa")
    parser.add_argument("--ffn", default="moe", help="moe or dense")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    config = {**DEMO, "attention": {"name": arguments.attention}, "ffn": {"name": arguments.ffn}}
    model = build_model(installed().registry, ModelConfig(**config), seed=0).to(arguments.device).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {arguments.device}, {torch.get_num_threads()} threads")
    print(f"{'batch':>6} {'prefill tok/s':>14} {'decode tok/s':>13} {'ms a step':>10}")
    params = SamplingParams(temperature=arguments.temperature, top_p=arguments.top_p)
    results = []
    for batch in arguments.batches:
        row = measure(model, batch, arguments.prompt, arguments.tokens, params, arguments.repeats)
        results.append(row)
        print(
            f"{batch:>6} {row['prefill_tokens_per_second']:>14,.0f} {row['decode_tokens_per_second']:>13,.0f} "
            f"{row['step_milliseconds']:>10.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": config, "parameters": parameters, "rows": results}, indent=2))


if __name__ == "__main__":
    main()
