"""The generation engine in figures: decode, prefill, latency under load, memory, beside `generate` of transformers.

    python benchmarks/serve.py [--model demo|lite12] [--device cuda] [--batches 1 64 256] [--json serve.json]

Weights are random and the same for the peer. Decode is the median step once all prompts are in, scheduling, sampling
and the copy to the host included; its roofline is what a step has to read over what this machine copies in the same
run. Latency is measured on the engine in this process, at shares of the throughput measured before. Defaults are a
minute on two CPU cores; on a GPU the default model is the one of docs/serving.md. Leaves out HTTP (its cost is the
server's) and several GPUs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_cases.case import Settings
from kernel_cases.timing import copy_rate
from serve_measures.load import poisson
from serve_measures.memory import LONG, cache_bytes_per_token, concurrent_contexts
from serve_measures.models import MODELS, random_model
from serve_measures.peer import Peer
from serve_measures.throughput import decode, prefill

from deepwright_core.engine import Engine
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import count
from deepwright_core.plugins import installed

PARTS = ("decode", "prefill", "load", "memory", "peer")
HEADROOM = 512  # tokens of cache for each sequence beyond its prompt


def options() -> argparse.Namespace:
    """The command line, with defaults that fit the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), help="default: lite12 on a GPU, demo on a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences that decode at once")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, help="decode steps that are timed")
    parser.add_argument("--temperature", type=float, default=0.0, help="of decoding; the peer is greedy")
    parser.add_argument("--loads", type=float, nargs="*", default=[0.5, 0.8], help="shares of the throughput")
    parser.add_argument("--requests", type=int, help="requests at each load")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer under load")
    parser.add_argument("--cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--graphs", choices=["auto", "off"], default="auto")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to measure")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    gpu = chosen.device.startswith("cuda")
    for name, on_gpu, on_cpu in (
        ("model", "lite12", "demo"),
        ("batches", [1, 64, 256], [1, 8, 64]),
        ("prompt", 1024, 64),
        ("steps", 100, 60),
        ("requests", 200, 40),
    ):
        if getattr(chosen, name) is None:
            setattr(chosen, name, on_gpu if gpu else on_cpu)
    return chosen


def main() -> None:
    """Measure and print."""
    chosen = options()
    device = torch.device(chosen.device)
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    registry = installed().registry
    config = ModelConfig(**MODELS[chosen.model])
    model = random_model(registry, config, device, dtype)
    cost = count(model)
    where = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} CPU threads"
    rate = copy_rate(Settings(device.type, dtype, compiled=False), 0.5)
    print(
        f"{chosen.model}: {cost.parameters_total / 1e9:.3f} B parameters, {cost.parameters_active / 1e9:.3f} B a "
        f"token, {dtype}; {where}, torch {torch.__version__}, copies {rate:.2f} TB/s"
    )
    found: dict[str, Any] = {"model": chosen.model, "device": where, "copy_rate": rate, "torch": torch.__version__}

    def engine(batch: int) -> Engine:
        return Engine(
            model,
            0,
            max_batch=batch,
            cache_tokens=batch * (chosen.prompt + HEADROOM),
            cache_dtype=chosen.cache_dtype,
            graphs=chosen.graphs,
        )

    peer = Peer(registry, model) if "peer" in chosen.only else None
    rows = []
    if "decode" in chosen.only or "load" in chosen.only:
        print(f"\ndecode after {chosen.prompt} tokens, temperature {chosen.temperature:g}, graphs {chosen.graphs}")
        print(f"{'batch':>6} {'tok/s':>10} {'ms a step':>10} {'slowest':>9} {'roofline':>9}" + " " * 3 + "peer tok/s")
        for batch in chosen.batches:
            row = decode(engine(batch), cost, batch, chosen.prompt, chosen.steps, chosen.temperature, rate)
            rows.append(asdict(row))
            beside = ""
            if peer is not None:
                theirs = peer.decode_tokens_per_second(batch, chosen.prompt, min(chosen.steps, 34))
                rows[-1]["peer_tokens_per_second"] = theirs
                beside = f"{theirs:>10,.1f} ({row.tokens_per_second / theirs:.1f}x)"
            print(
                f"{batch:>6} {row.tokens_per_second:>10,.0f} {row.milliseconds:>10.3f} "
                f"{row.slowest_milliseconds:>9.2f} {row.roofline_share:>9.1%}   {beside}"
            )
        found["decode"] = rows
    served = engine(max(chosen.batches))
    if "prefill" in chosen.only or "load" in chosen.only:
        many = max(8, 32768 // chosen.prompt) if gpu else 8
        speed = prefill(served, many, chosen.prompt, repeats=2)
        found["prefill_tokens_per_second"] = speed
        flops = speed * cost.forward_flops(1, chosen.prompt / 2) / 1e12
        print(f"\nprefill of {many} prompts of {chosen.prompt}: {speed:,.0f} tok/s, {flops:.2f} TFLOP/s")
        if peer is not None:
            theirs = peer.prefill_tokens_per_second(8, chosen.prompt)
            found["peer_prefill_tokens_per_second"] = theirs
            print(f"transformers {peer.version}: {theirs:,.0f} tok/s")
    if "load" in chosen.only:
        capacity = 1 / (chosen.prompt / speed + chosen.answer / max(row["tokens_per_second"] for row in rows))
        print(f"\nPoisson load, {chosen.prompt} tokens in and {chosen.answer} out, milliseconds (p50 / p90 / p99)")
        print(f"{'requests/s':>11} {'tok/s':>9} {'at once':>8}   {'first token':>22}   {'next token':>22}")
        found["load"] = []
        for share in chosen.loads:
            load = poisson(served, share * capacity, chosen.requests, chosen.prompt, chosen.answer)
            found["load"].append(asdict(load))
            first, gap = (
                " / ".join(f"{value:.1f}" for value in each.values()) for each in (load.first_token, load.gap)
            )
            print(
                f"{load.requests_per_second:>11.1f} {load.tokens_per_second:>9,.0f} {load.most_at_once:>8}   "
                f"{first:>22}   {gap:>22}"
            )
    if "memory" in chosen.only:
        measured = cache_bytes_per_token(served)
        contexts = concurrent_contexts(cost, served, model.fp8_cache_bytes)
        found["memory"] = {"cache_bytes_per_token": measured, "contexts": contexts}
        print(f"\ncache: {measured:,.0f} bytes a token as allocated; contexts of {LONG} that fit beside the weights:")
        for kind, row in contexts.items():
            print(f"{kind:>18}: {row['bytes_per_token']:>9,.0f} bytes a token, {row['contexts']:>6,} contexts")
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
