"""Speculative decoding in figures: the time of steps with drafts, what must be accepted for a gain, and what a model
accepts and gains.

    python benchmarks/speculation.py [--model demo|lite12] [--device cuda] [--batches 1 64]
    python benchmarks/speculation.py --directory DIR --text FILE [--temperatures 0 1]

Without a directory the weights are random: nearly no draft is accepted, and what is measured is the price of a step of
k drafts beside a plain one, and the accepted drafts a step from which it pays. With the directory of a trained model,
its answers to the beginnings of the text's paragraphs are generated with and without drafts; their tokens are compared.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from serve_measures.models import MODELS, random_model
from serve_measures.speculation import speculative

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.engine.speculation import MAX_DRAFTS
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import find_model, load_model
from deepwright_core.plugins import installed
from deepwright_core.tokenizer import Tokenizer

HEADROOM = 1024  # tokens of cache for each sequence beyond its prompt


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), help="shape with random weights; default by device")
    parser.add_argument("--directory", type=Path, help="a trained model instead")
    parser.add_argument("--text", type=Path, help="its paragraphs begin the prompts (with --directory)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--drafts", type=int, nargs="+", default=list(range(1, MAX_DRAFTS + 1)))
    parser.add_argument("--prompt", type=int, help="tokens of a prompt (1024 on a GPU, 64 elsewhere)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=96, help="longest answer of a trained model")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if (chosen.directory is None) != (chosen.text is None):
        parser.error("--directory and --text go together")
    return chosen


def steps(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Random weights: times of steps."""
    gpu = chosen.device.startswith("cuda")
    prompt = chosen.prompt or (1024 if gpu else 64)
    shape = MODELS[chosen.model or ("lite12" if gpu else "demo")]
    config = ModelConfig(**shape)
    dtype = torch.bfloat16 if gpu else torch.float32
    model = random_model(installed().registry, config, torch.device(chosen.device), dtype)
    print(f"{'batch':>6} {'drafts':>7} {'ms a step':>10} {'x plain':>8} {'break-even':>11} {'accepted':>9}")
    rows = []
    for batch in chosen.batches:
        plain = 0.0
        for drafts in (0, *chosen.drafts):
            engine = Engine(model, 0, max_batch=batch, cache_tokens=batch * (prompt + HEADROOM), speculate=drafts)
            row = speculative(engine, batch, drafts, prompt, chosen.steps, chosen.temperatures[0])
            plain = plain or row.milliseconds
            even = row.break_even(plain)
            rows.append({**asdict(row), "plain_milliseconds": plain, "break_even": even})
            print(
                f"{batch:>6} {drafts:>7} {row.milliseconds:>10.3f} {row.milliseconds / plain:>8.2f} {even:>11.2f} "
                f"{row.accepted:>9.2f}"
            )
    return rows


def gains(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """A trained model: acceptance and gain."""
    directory = find_model(chosen.directory)
    dtype = torch.bfloat16 if chosen.device.startswith("cuda") else torch.float32
    model = load_model(directory, installed().registry, device=torch.device(chosen.device), dtype=dtype)
    tokenizer = Tokenizer.load(directory)
    paragraphs = [part for part in chosen.text.read_text().split("\n\n") if len(part) > 40]
    prompts = [tokenizer.encode(part)[: chosen.prompt or 24] for part in paragraphs]
    print(
        f"{'batch':>6} {'temp':>5} {'drafts':>7} {'tok/s':>9} {'gain':>6} {'tokens a step':>14}  accepted at each place"
    )
    rows = []
    for batch in chosen.batches:
        asked = [prompts[i % len(prompts)] for i in range(batch)]
        for temperature in chosen.temperatures:
            params = SamplingParams(max_tokens=chosen.tokens, temperature=temperature, ignore_eos=True)
            wanted = [replace(params, seed=i) for i in range(batch)]
            plain, tokens = 0.0, None
            for drafts in (0, *chosen.drafts):
                engine = Engine(model, tokenizer.end_ids, max_batch=batch, speculate=drafts)
                engine.generate(asked, wanted)
                start = time.perf_counter()
                answers = [c.token_ids for c in engine.generate(asked, wanted)]
                rate = sum(map(len, answers)) / (time.perf_counter() - start)
                tokens, plain = tokens or answers, plain or rate
                same = sum(a == b for a, b in zip(tokens, answers, strict=True))
                stats = engine.stats
                places = [count / max(1, stats.draft_steps) for count in stats.accepted_at]
                rows.append(
                    {
                        "batch": batch,
                        "temperature": temperature,
                        "drafts": drafts,
                        "tokens_per_second": rate,
                        "gain": rate / plain,
                        "accepted_at": places,
                        "same_answers": same,
                    }
                )
                print(
                    f"{batch:>6} {temperature:>5.1f} {drafts:>7} {rate:>9,.0f} {rate / plain:>6.2f} "
                    f"{1 + sum(places):>14.2f}  {' '.join(f'{place:.1%}' for place in places)}"
                    f"   ({same} of {batch} answers the same)"
                )
    return rows


def main() -> None:
    """Measure and print."""
    chosen = options()
    rows = gains(chosen) if chosen.directory else steps(chosen)
    if chosen.json:
        chosen.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
