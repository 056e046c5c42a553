"""What the table's rows compile at their first call, compiled beforehand in several processes at once.

torch.compile's peers, our Triton kernels and the CUDA kernels leave what they compile on disk, so a process that times
them afterwards only reads it. Each process takes a share of one operator's cases and calls everything once. What fails
here (memory that several processes want at once, say) fails or succeeds again in the table, which tells. Leaves out
plain references and copies, which compile nothing.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from .case import Settings

# Shares of an operator's cases. More would draw the same inputs more often, fewer leave processors idle in the end.
SHARES = 6
MOST_PROCESSES = 16
COMPILES_NOTHING = ("eager", "reference", "copy")


def _call_all(operator: str, share: int, without: Sequence[str], settings: Settings) -> int:
    """Call what compiles of every SHARES-th case of an operator once; how many calls that were."""
    warnings.filterwarnings("ignore")
    calls = 0
    for index, case in enumerate(importlib.import_module(f"kernel_cases.{operator}").cases(settings)):
        if index % SHARES != share:
            continue
        for name, run in case.runs.items():
            if name in COMPILES_NOTHING or name in without:
                continue
            try:
                run()
                calls += 1
            except Exception:  # peers fail in ways of their own
                continue
        torch.compiler.reset()
        if settings.gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return calls


def prepare(operators: Sequence[str], without: Sequence[str], settings: Settings) -> None:
    """Compile what these operators' cases will call, and say on stderr how far it is."""
    start, left = time.monotonic(), {operator: SHARES for operator in operators}
    processes = min(MOST_PROCESSES, len(os.sched_getaffinity(0)), SHARES * len(operators))
    print(f"compiling in {processes} processes what the table will call", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = {
            pool.submit(_call_all, operator, share, without, settings): operator
            for operator in reversed(operators)  # those that compile longest (attention, routers) stand last
            for share in range(SHARES)
        }
        for future in as_completed(running):
            operator = running[future]
            left[operator] -= 1
            try:
                future.result()
            except BrokenProcessPool:
                print("  a process ended; what is left is compiled by the table itself", file=sys.stderr, flush=True)
                break
            except Exception as error:
                print(f"  {operator}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if not left[operator]:
                ready = sum(not shares for shares in left.values())
                seconds = time.monotonic() - start
                print(f"  {seconds:4.0f} s  {ready:2}/{len(left)}  {operator}", file=sys.stderr, flush=True)
