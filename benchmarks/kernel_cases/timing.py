"""How long work takes on a device, and what the device can do at best."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from .case import BYTES, FLOPS, FP8_FLOPS, Run, Settings

# Several times the largest L2: what a run left in the cache must not speed up the next one.
FLUSH_BYTES = 2**28
# Written so often, it keeps a GPU busy for about a millisecond, in which the host can prepare the call that is timed.
FLUSHES = 16
MOST_RUNS = 200


@dataclass(frozen=True)
class Times:
    """Medians in milliseconds: device, how long the device works for a call; host, how long the host needs to ask for
    it (on a CPU the same). A call that is asked for more slowly than it is done takes the host's time."""

    device: float
    host: float


def times(run: Run, device: str, seconds: float) -> Times:
    """Medians over as many calls as fit in `seconds`, at least five, after three to warm up.

    On a GPU each call finds the L2 full of something else, and the device busy for long enough that the host runs
    ahead: what is measured between two events is the work alone.
    """
    for _ in range(3):
        run()
    on_host: list[float] = []
    if device == "cpu":
        begin = time.perf_counter()
        while len(on_host) < 5 or (time.perf_counter() - begin < seconds and len(on_host) < MOST_RUNS):
            start = time.perf_counter()
            run()
            on_host.append((time.perf_counter() - start) * 1e3)
        return Times(statistics.median(on_host), statistics.median(on_host))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(FLUSHES):
        flush.zero_()
    run()
    torch.cuda.synchronize()
    count = max(5, min(MOST_RUNS, int(seconds / (time.perf_counter() - begin + 1e-9))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start_event, end_event in events:
        for _ in range(FLUSHES):
            flush.zero_()
        start_event.record()
        start = time.perf_counter()
        run()
        on_host.append((time.perf_counter() - start) * 1e3)
        end_event.record()
        torch.cuda.synchronize()
    on_device = [start_event.elapsed_time(end_event) for start_event, end_event in events]
    return Times(statistics.median(on_device), statistics.median(on_host))


def peak_mebibytes(run: Run) -> float:
    """Most memory that a call takes beyond what was there before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_rate(settings: Settings, seconds: float) -> float:
    """Bytes read and written by a plain copy, in units of 10¹² a second."""
    source = torch.empty(2**30 if settings.gpu else 2**26, dtype=torch.uint8, device=settings.device).random_()
    target = torch.empty_like(source)
    return 2e-9 * source.numel() / times(lambda: target.copy_(source), settings.device, seconds).device


def shortest(settings: Settings, seconds: float) -> float:
    """What a launch that does next to nothing takes, in milliseconds: no row can be below."""
    number = torch.zeros((), device=settings.device)
    return times(lambda: number.add_(1), settings.device, seconds).device


def copy_of(amount: float, device: str) -> Run:
    """A plain copy that reads and writes `amount` bytes together: what a kernel that moves as many is up against. Small
    ones do not reach the rate of a large copy, for they end before memory is at its pace."""
    source = torch.zeros(max(1, int(amount / 2)), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def product_rates(settings: Settings, seconds: float) -> dict[str, float]:
    """Operations of large square products, in units of 10¹² a second."""
    size = 8192 if settings.gpu else 1024
    a, b = torch.randn(2, size, size, device=settings.device).to(settings.dtype)
    found = {FLOPS: 2e-9 * size**3 / times(lambda: a @ b, settings.device, seconds).device}
    if settings.gpu and torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device=settings.device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
        product = times(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16), settings.device, seconds)
        found[FP8_FLOPS] = 2e-9 * size**3 / product.device
    return found


def ceilings(settings: Settings, seconds: float) -> dict[str, float]:
    """What this machine reaches at best, by unit."""
    return {BYTES: copy_rate(settings, seconds), **product_rates(settings, seconds)}
