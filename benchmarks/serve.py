"""The generation engine in figures: decode, prefill, latency under load, memory, beside `generate` of transformers.

    python benchmarks/serve.py [--model demo|lite12|DIRECTORY] [--device cuda] [--batches 1 64 256] [--json serve.json]

Weights are random, or those of a model directory, and the same for the peer. Decode is the median step once all prompts
are in, scheduling, sampling and the copy to the host included; its roofline is what a step has to read over what this
machine copies in the same run. Speculation is measured on what the model itself writes: only a trained model's modules
guess that; what must be guessed for a gain is told with any weights. Load is put on the engine in this process, at
shares of the throughput measured before. The part `http` writes the model to a temporary directory and is the client of
a server in a process of its own. Defaults take two minutes on two CPU cores; on a GPU the default model is the one of
docs/serving.md (13 GB on the disk for `http`). Leaves out several GPUs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_cases.case import Settings
from kernel_cases.timing import copy_rate
from serve_measures.adapters import RANK, random_adapter
from serve_measures.load import poisson
from serve_measures.memory import LONG, cache_bytes_per_token, concurrent_contexts
from serve_measures.models import MODELS, random_model
from serve_measures.over_http import hang_up_half, pair_tokenizer, served, stream_together
from serve_measures.peer import Peer
from serve_measures.throughput import Decode, decode, own_texts, prefill, prompts

from deepwright_core.engine import Engine
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import count
from deepwright_core.model.directory import find_model, load_model, save_model
from deepwright_core.plugins import installed

PARTS = ("decode", "adapters", "speculation", "prefill", "load", "memory", "http")
HEADROOM = 512  # tokens of cache for each sequence beyond its prompt
PEER_TOKENS = 34


def options() -> argparse.Namespace:
    """The command line, with defaults that fit the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"{', '.join(sorted(MODELS))} or a directory; default lite12 on a GPU, or demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+", help="sequences that decode at once")
    parser.add_argument("--prompt", type=int, help="tokens of a prompt")
    parser.add_argument("--steps", type=int, help="decode steps that are timed")
    parser.add_argument("--temperature", type=float, default=0.0, help="of decoding; the peer is greedy")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3], help="tokens that speculation drafts")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8], help="LoRA adapters loaded at once")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.8], help="shares of the throughput")
    parser.add_argument("--requests", type=int, help="requests at each load")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer under load")
    parser.add_argument("--hang-ups", type=int, default=500, help="streams over HTTP of which half are hung up on")
    parser.add_argument("--cache-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--graphs", choices=["auto", "off"], default="auto")
    parser.add_argument("--batch-invariant", action="store_true", help="the same bits in any company")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS), help="parts to measure")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    gpu = chosen.device.startswith("cuda")
    for name, on_gpu, on_cpu in (
        ("model", "lite12", "demo"),
        ("batches", [1, 64, 256], [1, 8, 64]),
        ("prompt", 1024, 128),
        ("steps", 100, 60),
        ("requests", 200, 40),
    ):
        if getattr(chosen, name) is None:
            setattr(chosen, name, on_gpu if gpu else on_cpu)
    return chosen


class Report:
    """The model, and each part of what is measured of it: printed at once, collected for `--json`."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.device = torch.device(chosen.device)
        self.gpu = self.device.type == "cuda"
        dtype = torch.bfloat16 if self.gpu else torch.float32
        registry = installed().registry
        self.trained = chosen.model not in MODELS
        if self.trained:
            self.model = load_model(Path(chosen.model), registry, device=self.device, dtype=dtype).eval()
        else:
            self.model = random_model(registry, ModelConfig(**MODELS[chosen.model]), self.device, dtype)
        self.cost = count(self.model)
        self.rate = copy_rate(Settings(self.device.type, dtype, compiled=False), 0.5)
        where = torch.cuda.get_device_name(self.device) if self.gpu else f"{torch.get_num_threads()} CPU threads"
        print(
            f"{chosen.model}: {self.cost.parameters_total / 1e9:.3f} B parameters, "
            f"{self.cost.parameters_active / 1e9:.3f} B a token, {dtype}; {where}, torch {torch.__version__}, "
            f"copies {self.rate:.2f} TB/s"
        )
        self.found: dict[str, Any] = {"options": {k: str(v) for k, v in vars(chosen).items()}, "device": where}
        self.found |= {"torch": torch.__version__, "copy_rate": self.rate}
        self.peer = None if chosen.no_peer else Peer(registry, self.model)
        self._decoded: dict[int, Decode] = {}
        self._prefilled = 0.0

    def engine(self, batch: int, drafts: int = 0) -> Engine:
        """An engine with room for `batch` sequences."""
        return Engine(
            self.model,
            0,
            max_batch=batch,
            cache_tokens=batch * (self.chosen.prompt + HEADROOM),
            cache_dtype=self.chosen.cache_dtype,
            graphs=self.chosen.graphs,
            batch_invariant=self.chosen.batch_invariant,
            speculate=drafts,
        )

    def _decode(self, batch: int, drafts: int = 0) -> Decode:
        return self._measure(self.engine(batch, drafts), batch)

    def _measure(self, engine: Engine, batch: int, adapters: Sequence[str] = ("",)) -> Decode:
        vocabulary, length = self.model.config.vocab_size, self.chosen.prompt
        given = own_texts(engine, batch, length) if self.trained else prompts(vocabulary, batch, length)
        return decode(engine, self.cost, given, self.chosen.steps, self.chosen.temperature, self.rate, adapters)

    def decode(self) -> None:
        """Tokens a second by batch."""
        chosen = self.chosen
        print(
            f"\ndecode after {chosen.prompt} tokens, temperature {chosen.temperature:g}, graphs {chosen.graphs}"
            f"{', batch-invariant' if chosen.batch_invariant else ''}"
        )
        print(f"{'batch':>6} {'tok/s':>10} {'ms a step':>10} {'slowest':>9} {'roofline':>9}   peer tok/s")
        rows = []
        for batch in chosen.batches:
            row = self._decoded[batch] = self._decode(batch)
            rows.append(asdict(row))
            beside = ""
            if self.peer is not None:
                theirs = self.peer.decode_tokens_per_second(batch, chosen.prompt, min(chosen.steps, PEER_TOKENS))
                rows[-1]["peer_tokens_per_second"] = theirs
                beside = f"{theirs:>10,.1f} ({row.tokens_per_second / theirs:.1f}x)"
            print(
                f"{batch:>6} {row.tokens_per_second:>10,.0f} {row.milliseconds:>10.3f} "
                f"{row.slowest_milliseconds:>9.2f} {row.roofline_share:>9.1%}   {beside}",
                flush=True,
            )
        self.found["decode"] = rows

    def adapters(self) -> None:
        """Decode while LoRA adapters are loaded, and the requests use them in turn."""
        print(f"\nadapters of attention, rank {RANK}: the requests use them in turn")
        print(f"{'batch':>6} {'adapters':>9} {'tok/s':>10} {'ms a step':>10} {'of none':>8}")
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            random_adapter(self.model, Path(folder))
            for batch in self.chosen.batches:
                plain = self._decoded.get(batch) or self._decode(batch)
                for number in self.chosen.adapters:
                    engine, names = self.engine(batch), [f"adapter-{i}" for i in range(number)]
                    for name in names:
                        engine.load_adapter(name, Path(folder))
                    row = self._measure(engine, batch, names)
                    for name in names:
                        engine.drop_adapter(name)
                    share = row.tokens_per_second / plain.tokens_per_second
                    rows.append(asdict(row) | {"adapters": number, "share_of_none": share})
                    speed = f"{row.tokens_per_second:>10,.0f} {row.milliseconds:>10.3f} {share:>8.0%}"
                    print(f"{batch:>6} {number:>9} {speed}", flush=True)
        self.found["adapters"] = rows

    def speculation(self) -> None:
        """Acceptance and gain of the model's MTP modules, and from how many tokens a step on there is a gain: that is a
        matter of the shape and the machine, not of the weights."""
        if not self.model.config.mtp.depth:
            print("\nspeculation: the model has no MTP module")
            return
        print(f"\nspeculation, {'its own texts' if self.trained else 'random weights: nothing is guessed'}")
        print(
            f"{'batch':>6} {'drafts':>7} {'ms a step':>10} {'pays from':>10} {'tokens a step':>14} {'tok/s':>10} "
            f"{'gain':>6}   accepted"
        )
        rows = []
        for batch in self.chosen.batches:
            plain = self._decoded.get(batch) or self._decode(batch)
            for drafts in self.chosen.drafts:
                row = self._decode(batch, drafts)
                gain = row.tokens_per_second / plain.tokens_per_second
                pays = row.milliseconds / plain.milliseconds  # with as many tokens a step it is no loss
                rows.append(asdict(row) | {"drafts": drafts, "gain": gain, "pays_from_tokens_a_step": pays})
                print(
                    f"{batch:>6} {drafts:>7} {row.milliseconds:>10.3f} {pays:>10.2f} {row.tokens_a_step:>14.2f} "
                    f"{row.tokens_per_second:>10,.0f} {gain:>5.2f}x   {', '.join(f'{a:.0%}' for a in row.accepted)}",
                    flush=True,
                )
        self.found["speculation"] = rows

    def _prefill_speed(self) -> float:
        many = max(8, 32768 // self.chosen.prompt) if self.gpu else 8
        return prefill(self.engine(many), many, self.chosen.prompt, repeats=2)

    def prefill(self) -> None:
        """Prompt tokens a second."""
        speed = self._prefilled = self._prefill_speed()
        flops = speed * self.cost.forward_flops(1, self.chosen.prompt / 2) / 1e12
        self.found["prefill"] = {"tokens_per_second": speed, "tflops": flops}
        print(f"\nprefill of prompts of {self.chosen.prompt}: {speed:,.0f} tok/s, {flops:.2f} TFLOP/s")
        if self.peer is not None:
            theirs = self.peer.prefill_tokens_per_second(8, self.chosen.prompt)
            self.found["prefill"]["peer_tokens_per_second"] = theirs
            print(f"transformers {self.peer.version}: {theirs:,.0f} tok/s ({speed / theirs:.1f}x)", flush=True)

    def load(self) -> None:
        """Latencies under Poisson load."""
        chosen, batch = self.chosen, max(self.chosen.batches)
        speed = self._prefilled or self._prefill_speed()
        decoded = self._decoded.get(batch) or self._decode(batch)
        capacity = 1 / (chosen.prompt / speed + chosen.answer / decoded.tokens_per_second)
        print(f"\nPoisson load, {chosen.prompt} tokens in and {chosen.answer} out; milliseconds: p50 / p90 / p99")
        print(f"{'requests/s':>11} {'tok/s':>9} {'at once':>8}   {'first token':>22}   {'next token':>22}")
        engine, rows = self.engine(batch), []
        engine.warm_up()
        for number, share in enumerate(chosen.loads):
            # Once unmeasured: prompts that arrive together in other numbers make calls of other shapes, to be compiled.
            for seed in (100 + 2 * number, 101 + 2 * number):
                load = poisson(engine, share * capacity, chosen.requests, chosen.prompt, chosen.answer, seed)
            rows.append(asdict(load))
            first, gap = (
                " / ".join(f"{value:.1f}" for value in each.values()) for each in (load.first_token, load.gap)
            )
            print(
                f"{load.requests_per_second:>11.1f} {load.tokens_per_second:>9,.0f} {load.most_at_once:>8}   "
                f"{first:>22}   {gap:>22}",
                flush=True,
            )
        self.found["load"] = rows

    def memory(self) -> None:
        """Bytes of cache, and how many long contexts fit."""
        engine = self.engine(max(self.chosen.batches))
        measured = cache_bytes_per_token(engine)
        contexts = concurrent_contexts(self.cost, engine, self.model.fp8_cache_bytes)
        self.found["memory"] = {"cache_bytes_per_token": measured, "contexts": contexts}
        print(f"\ncache: {measured:,.0f} bytes a token as allocated; contexts of {LONG} that fit beside the weights:")
        for kind, row in contexts.items():
            print(f"{kind:>18}: {row['bytes_per_token']:>9,.0f} bytes a token, {row['contexts']:>6,} contexts")

    def http(self) -> None:
        """The same decoding as clients of the server have it, which runs in a process of its own."""
        chosen, vocabulary = self.chosen, self.model.config.vocab_size
        alone = {batch: self._decoded.get(batch) or self._decode(batch) for batch in chosen.batches}
        most = max(chosen.batches)
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            directory = find_model(Path(chosen.model)) if self.trained else Path(folder)
            if not self.trained:
                save_model(self.model, directory)
                pair_tokenizer(vocabulary).save(directory)
            with served(directory, chosen.device, most, most * (chosen.prompt + HEADROOM)) as server:
                print(f"\nstreams over HTTP of {chosen.steps} tokens; milliseconds: p50 / p90 / p99")
                print(f"{'streams':>8} {'tok/s':>9} {'of engine':>10}   {'first token':>22}   {'next event':>22}")
                for batch in chosen.batches:
                    for seed in (1000 + 2 * batch, 1001 + 2 * batch):  # once unmeasured: kernels are compiled
                        row = stream_together(server.address, vocabulary, batch, chosen.prompt, chosen.steps, seed)
                    share = row.tokens_per_second / alone[batch].tokens_per_second
                    rows.append(asdict(row) | {"share_of_engine": share})
                    first, gap = (
                        " / ".join(f"{value:.1f}" for value in each.values()) for each in (row.first_token, row.gap)
                    )
                    print(
                        f"{batch:>8} {row.tokens_per_second:>9,.0f} {share:>10.0%}   {first:>22}   {gap:>22}",
                        flush=True,
                    )
                left = hang_up_half(server.address, vocabulary, chosen.hang_ups)
        print(f"{chosen.hang_ups} streams, half of them hung up midway: {left:.2%} of the cache is in use afterwards")
        self.found["http"] = {"streams": rows, "hang_ups": chosen.hang_ups, "cache_in_use_afterwards": left}


def main() -> None:
    """Measure and print."""
    chosen = options()
    report = Report(chosen)
    for part in PARTS:
        if part in chosen.only:
            getattr(report, part)()
    if chosen.json:
        chosen.json.write_text(json.dumps(report.found, indent=2) + "\n")


if __name__ == "__main__":
    main()
