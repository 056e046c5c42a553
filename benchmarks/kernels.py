"""One table of the operators of deepwright_kernels on the present device, beside their peers.

    python benchmarks/kernels.py [--only rms_norm ...] [--no-compile] [--without eager] [--json results.json]

`ours` is what `auto` picks on the device (the backend is named). `eager` is the plain reference, `compile` the
reference under torch.compile, further peers are named for what they are: torch's own operation, FlashMLA, DeepGEMM or
liger-kernel where they can be imported; `copy` is a plain copy of as many bytes as the row has to move, which at
small sizes stays below the ceiling, a large copy. Rates count the bytes that have to move, or the products that have
to be made, whatever an implementation really does; the share is of what this machine reached in the same run with a
large copy or a plain matrix product. Times are medians with a cold L2 of the device's work alone; `host` is what the
host needs to ask for it, which decides where it is more (a CUDA graph takes it away). Memory is what a call takes
beyond its inputs. Gradients are included where the row says so.

What is compiled at a first call is compiled beforehand, in as many processes as there are processors (16 at most), and
the table then times one call after the other: about five minutes on a machine with one H200 and 16 processors, of which
torch.compile is most. Leaves out several GPUs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import kernel_cases
import torch
from kernel_cases.case import BYTES, Case, Settings
from kernel_cases.preparation import prepare
from kernel_cases.timing import ceilings, copy_of, peak_mebibytes, shortest, times

MACHINERY = {"case", "preparation", "timing"}
CASES: dict[str, Callable[[Settings], Iterator[Case]]] = {
    module.name: importlib.import_module(f"kernel_cases.{module.name}").cases
    for module in pkgutil.iter_modules(kernel_cases.__path__)
    if module.name not in MACHINERY
}


@dataclass(frozen=True)
class Row:
    """A measurement."""

    operator: str
    shape: str
    implementation: str
    milliseconds: float
    host_milliseconds: float
    rate: float
    unit: str
    share: float | None
    peak_mebibytes: float | None


def measure(
    case: Case, settings: Settings, limits: dict[str, float], seconds: float, without: list[str]
) -> Iterator[Row]:
    """One row for each implementation; one that fails (out of memory, say) is reported and left out."""
    runs = dict(case.runs)
    if case.unit == BYTES and settings.gpu:
        runs["copy"] = copy_of(case.amount, settings.device)
    for name, run in runs.items():
        if name in without:
            continue
        try:
            peak = peak_mebibytes(run) if settings.gpu else None
            taken = times(run, settings.device, seconds)
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            print(f"{case.operator} {case.shape} {name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
            continue
        rate = case.amount / taken.device / 1e9
        share = rate / limits[case.unit] if case.unit in limits else None
        yield Row(case.operator, case.shape, name, taken.device, taken.host, rate, case.unit, share, peak)


def line(row: Row, backend: str) -> str:
    """As the table shows it."""
    label = f"*{backend}" if row.implementation == "ours" else row.implementation
    share = "" if row.share is None else f"{row.share:.0%}"
    peak = "" if row.peak_mebibytes is None else f"{row.peak_mebibytes:,.0f}"
    rate = f"{row.rate:,.2f}" if row.rate < 10 else f"{row.rate:,.0f}"
    device, host = readable(row.milliseconds), readable(row.host_milliseconds)
    return f"{row.operator:36}{row.shape:44}{label:20}{device:>12}{rate:>9} {row.unit:12}{share:>6}{host:>12}{peak:>10}"


def readable(milliseconds: float) -> str:
    """In milliseconds, or in microseconds below a tenth of one."""
    return f"{milliseconds:.3f} ms" if milliseconds >= 0.1 else f"{milliseconds * 1e3:.1f} µs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the operators of deepwright_kernels beside their peers.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=sorted(CASES), metavar="OPERATOR")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a while)")
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", help="leave these out: eager, liger, ...")
    parser.add_argument("--seconds", type=float, default=0.1, help="time spent on each measurement")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()

    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    settings = Settings(options.device, dtype, not options.no_compile)
    start = time.monotonic()
    if settings.gpu or settings.compiled:
        prepare(options.only, options.without, settings)
    ready = time.monotonic()
    name = torch.cuda.get_device_name() if settings.gpu else f"{platform.machine()} CPU"
    limits = ceilings(settings, options.seconds)
    print(f"{name}, torch {torch.__version__}, {dtype}, {torch.get_num_threads()} threads")
    floor = shortest(settings, options.seconds)
    found = ", ".join(f"{rate:,.2f} {unit}" for unit, rate in limits.items())
    print(f"ceilings: {found}; adding one to one number takes {readable(floor)}\n")
    heading = f"{'operator':36}{'shape':44}{'which':20}{'time':>12}{'rate':>9} {'':12}{'share':>6}{'host':>12}"
    print(f"{heading}{'peak MiB':>10}")
    rows: list[Row] = []
    for operator in options.only:
        for case in CASES[operator](settings):
            for row in measure(case, settings, limits, options.seconds, options.without):
                rows.append(row)
                print(line(row, case.backend), flush=True)
            torch.compiler.reset()  # the next case's graphs shall not be looked for among this one's
    print(
        f"\n* ours, with the backend that ran. {time.monotonic() - start:.0f} s, {ready - start:.0f} of them compiling"
    )
    if options.json:
        machine = {
            "device": name,
            "torch": torch.__version__,
            "dtype": str(dtype),
            "ceilings": limits,
            "shortest": floor,
        }
        results = {"machine": machine, "shortest": floor, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
