"""One table of the operators of deepwright_kernels on the present device, beside plain torch and torch.compile.

    python benchmarks/kernels.py [--device cpu|cuda] [--only rms_norm ...] [--no-compile] [--json results.json]

`ours` is what `auto` picks on the device. `eager` is the plain reference, `compile` the reference under torch.compile,
`built-in` torch's own operation where it has one. Rates count the bytes that have to move, or the products that have
to be made, whatever an implementation really does; the last column is the share of what this machine reached in the
same run with a plain copy or a plain matrix product of the same dtype. Times are medians. Gradients are included
where the row says so. Leaves out: multi-GPU, and peers that are not part of torch.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import deepwright_kernels as kernels
from deepwright_kernels import dispatch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row's work: what to run for each implementation, and how much has to be moved or multiplied."""

    operator: str
    shape: str
    runs: dict[str, Run]
    amount: float
    unit: str  # "GB/s" or "GFLOP/s"


@dataclass(frozen=True)
class Row:
    """A measurement."""

    operator: str
    shape: str
    implementation: str
    milliseconds: float
    rate: float
    unit: str
    share: float
    peak_mebibytes: float | None


def with_gradients(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> Run:
    """A forward and a backward pass."""

    def run() -> None:
        torch.autograd.grad(function(), leaves, upstream)

    return run


def median_milliseconds(run: Run, device: str, seconds: float) -> float:
    """Median over as many calls as fit in `seconds`, at least five, after two to warm up."""
    times: list[float] = []
    for _ in range(2):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
        begin = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 200):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    else:
        begin = time.perf_counter()
        while len(times) < 5 or (time.perf_counter() - begin < seconds and len(times) < 200):
            start_time = time.perf_counter()
            run()
            times.append((time.perf_counter() - start_time) * 1e3)
    return statistics.median(times)


def ceilings(device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """What this machine reaches: bytes copied and products made per second, in units of 10⁹."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() / median_milliseconds(lambda: target.copy_(source), device, seconds) / 1e6
    size = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    multiplied = 2 * size**3 / median_milliseconds(lambda: a @ b, device, seconds) / 1e6
    return {"GB/s": copied, "GFLOP/s": multiplied}


def implementations(operator: str, compiled: bool, built_in: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Name -> function for one operator."""
    reference = dispatch.load(operator, "reference")
    found: dict[str, Any] = {"ours": getattr(kernels, operator), "eager": reference}
    if compiled:
        found["compile"] = torch.compile(reference)
    if built_in is not None:
        found["built-in"] = built_in
    return found


def rms_norm_cases(device: str, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    for tokens, width in (
        [(16384, 2048), (16384, 7168), (128, 7168)] if device == "cuda" else [(4096, 128), (4096, 512)]
    ):
        x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
        weight = torch.ones(width, device=device, requires_grad=True)
        upstream = torch.randn_like(x)
        found = implementations("rms_norm", compiled, lambda x, w, eps: F.rms_norm(x, w.shape, w.to(x.dtype), eps))
        size = x.numel() * x.element_size()
        inputs = (x.detach(), weight.detach())
        forward = {name: (lambda f=f, inputs=inputs: f(*inputs, 1e-6)) for name, f in found.items()}
        yield Case("rms_norm", f"{tokens}x{width}", forward, 2 * size, "GB/s")
        training = {
            name: with_gradients(lambda f=f, x=x, w=weight: f(x, w, 1e-6), [x, weight], upstream)
            for name, f in found.items()
        }
        yield Case("rms_norm + gradients", f"{tokens}x{width}", training, 5 * size, "GB/s")


def rotary_cases(device: str, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    batch, tokens, heads, width = (4, 4096, 128, 64) if device == "cuda" else (8, 512, 4, 32)
    x = torch.randn(batch, tokens, heads, width, device=device, dtype=dtype, requires_grad=True)
    angle = torch.rand(tokens, 1, width // 2, device=device)
    cos, sin, upstream = angle.cos(), angle.sin(), torch.randn_like(x)
    found, size = implementations("rotary", compiled), x.numel() * x.element_size()
    shape = f"{batch}x{tokens}x{heads}x{width}"
    yield Case("rotary", shape, {n: (lambda f=f: f(x.detach(), cos, sin)) for n, f in found.items()}, 2 * size, "GB/s")
    training = {n: with_gradients(lambda f=f: f(x, cos, sin), [x], upstream) for n, f in found.items()}
    yield Case("rotary + gradients", shape, training, 4 * size, "GB/s")


def linear_cross_entropy_cases(device: str, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    tokens, width, vocabulary = (16384, 2048, 129280) if device == "cuda" else (2048, 128, 4096)
    hidden = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    upstream = torch.rand(tokens, device=device)

    def built_in(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        return (F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none"),)

    found = implementations("linear_cross_entropy", compiled, built_in)
    training = {
        name: with_gradients(lambda f=f: f(hidden, weight, targets)[0], [hidden, weight], upstream)
        for name, f in found.items()
    }
    # Three products have to be made; ours makes the first one twice instead of keeping its result.
    work = 3 * 2 * tokens * width * vocabulary
    yield Case("linear_cross_entropy + gradients", f"{tokens}x{width}->{vocabulary}", training, work, "GFLOP/s")


def mla_paged_decode_cases(device: str, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    on_gpu = [(128, 16, 4096, 512, 64, 64), (128, 128, 4096, 512, 64, 64), (1, 128, 32768, 512, 64, 64)]
    for batch, heads, length, latent, rope, block in on_gpu if device == "cuda" else [(32, 4, 512, 64, 16, 16)]:
        pages = -(-length // block)
        width = latent + rope
        cache = torch.randn((batch * pages + 1) * block, width, device=device, dtype=dtype)
        blocks = (torch.randperm(batch * pages, device=device) + 1).view(batch, pages)
        lengths = torch.full((batch,), length, device=device)
        arguments = (
            torch.randn(batch, 1, heads, latent, device=device, dtype=dtype),
            torch.randn(batch, 1, heads, rope, device=device, dtype=dtype),
            cache,
            blocks,
            lengths[:, None] - 1,
            lengths,
            block,
            (128 + rope) ** -0.5,
        )
        found = implementations("mla_paged_decode", compiled)
        runs = {name: (lambda f=f, a=arguments: f(*a)) for name, f in found.items()}
        moved = batch * length * width * cache.element_size()
        yield Case("mla_paged_decode", f"{batch} sequences x {length}, {heads} heads", runs, moved, "GB/s")


def grouped_linear_cases(device: str, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    on_gpu = [(32768, 8, 7168, 4096), (24576, 64, 2048, 2816)]
    for tokens, groups, inputs, outputs in on_gpu if device == "cuda" else [(4096, 8, 128, 128), (4096, 32, 64, 128)]:
        x = torch.randn(tokens, inputs, device=device, dtype=dtype, requires_grad=True)
        weight = (torch.randn(groups, outputs, inputs, device=device) * 0.02).to(dtype).requires_grad_()
        upstream = torch.randn(tokens, outputs, device=device, dtype=dtype)
        counts = torch.randint(groups, (tokens,)).bincount(minlength=groups)
        ends = counts.cumsum(0).int().to(device)
        # The loop reads the ends on the host, which torch.compile cannot follow.
        found = implementations("grouped_linear", compiled=False)
        work = 2 * tokens * inputs * outputs
        shape = f"{tokens} rows, {groups} x ({outputs}, {inputs})"
        constants = (x.detach(), weight.detach(), ends)
        forward = {n: (lambda f=f, constants=constants: f(*constants)) for n, f in found.items()}
        yield Case("grouped_linear", shape, forward, work, "GFLOP/s")
        training = {
            n: with_gradients(lambda f=f, x=x, w=weight, e=ends: f(x, w, e), [x, weight], upstream)
            for n, f in found.items()
        }
        yield Case("grouped_linear + gradients", shape, training, 3 * work, "GFLOP/s")


CASES: dict[str, Callable[[str, torch.dtype, bool], Iterator[Case]]] = {
    "rms_norm": rms_norm_cases,
    "rotary": rotary_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "mla_paged_decode": mla_paged_decode_cases,
    "grouped_linear": grouped_linear_cases,
}


def measure(case: Case, device: str, limits: dict[str, float], seconds: float) -> Iterator[Row]:
    """One row for each implementation; one that fails (out of memory, say) is reported and left out."""
    for name, run in case.runs.items():
        try:
            peak = None
            if device == "cuda":
                run()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                run()
                torch.cuda.synchronize()
                peak = (torch.cuda.max_memory_allocated() - before) / 2**20
            milliseconds = median_milliseconds(run, device, seconds)
        except RuntimeError as error:
            print(f"{case.operator} {case.shape} {name}: {str(error).splitlines()[0]}")
            continue
        rate = case.amount / milliseconds / 1e6
        share = rate / limits[case.unit]
        yield Row(case.operator, case.shape, name, milliseconds, rate, case.unit, share, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the operators of deepwright_kernels.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=sorted(CASES), metavar="OPERATOR")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a while)")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each measurement")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    limits = ceilings(options.device, dtype, options.seconds)
    print(f"{name}, torch {torch.__version__}, {dtype}, {torch.get_num_threads()} threads")
    print(f"copy {limits['GB/s']:,.0f} GB/s, matrix product {limits['GFLOP/s']:,.0f} GFLOP/s\n")
    print(f"{'operator':33}{'shape':34}{'which':10}{'ms':>10}{'rate':>12}{'':9}{'share':>6}{'peak MiB':>10}")
    rows: list[Row] = []
    for operator in options.only:
        for case in CASES[operator](options.device, dtype, not options.no_compile):
            for row in measure(case, options.device, limits, options.seconds):
                rows.append(row)
                peak = "" if row.peak_mebibytes is None else f"{row.peak_mebibytes:,.0f}"
                label = row.implementation
                if label == "ours":
                    label = f"*{dispatch.backend_for(operator, torch.zeros(1, device=options.device))}"
                print(
                    f"{row.operator:33}{row.shape:34}{label:10}{row.milliseconds:10.3f}{row.rate:12,.1f} "
                    f"{row.unit:8}{row.share:6.0%}{peak:>10}",
                    flush=True,
                )
    print("\n* ours, with the backend that ran")
    if options.json:
        machine = {"device": name, "torch": torch.__version__, "dtype": str(dtype), "ceilings": limits}
        options.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))


if __name__ == "__main__":
    main()
