"""Decode steps as CUDA graphs: captured once for each shape, replayed with one call.

A decoding step is some hundred small kernels, and a host that starts them one by one takes longer than the GPU needs to
run them. A graph starts them all at once. It always reads and writes the same addresses, so its work must take
everything that changes from step to step out of tensors that stay where they are (the runner's rows, the cache, the
weights), and the number of rows and the width of their block tables are padded to a few sizes.

Sampling is not part of a graph: the host starts it while the graph runs, so it costs nothing there, and it may change
with every request.

Left out: prefill (its kernels are long enough for the host to keep ahead), a change of the kernels' backends after a
capture (`deepwright_kernels.configure`; make a new engine).
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

log = logging.getLogger("deepwright.engine")

ROWS = (1, 2, 4, 8, 16)
STEP, WIDE_STEP, WIDE_FROM = 16, 32, 128
SHORTEST_CONTEXT = 1024  # tokens
WARM_CONTEXT = 4096
"""Up to so many tokens of context, graphs are captured beforehand; longer ones are seldom, and some take their time."""


def row_sizes(most: int) -> list[int]:
    """The numbers of rows that graphs are captured for: close enough for padding to cost little, up to `most`."""
    sizes = [*ROWS, *range(2 * STEP, WIDE_FROM, STEP), *range(WIDE_FROM, most, WIDE_STEP)]
    return [size for size in sizes if size < most] + [most]


def width_sizes(block_size: int, most: int) -> list[int]:
    """The widths of block tables that graphs are captured for, in blocks: powers of two of SHORTEST_CONTEXT."""
    sizes, size = [], -(-SHORTEST_CONTEXT // block_size)
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]


def padded(count: int, sizes: list[int]) -> int:
    """The smallest of the (ascending) sizes that `count` fits in."""
    return sizes[bisect.bisect_left(sizes, count)]


class Graphs:
    """Captured work by key. One pool of memory serves all graphs, because one runs after the other."""

    def __init__(self, device: torch.device) -> None:
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self.refusal: str | None = None
        """Why this model cannot be captured, once that was found out; everything then runs as it is written."""

    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """What `work` gives; the tensor is overwritten when the key runs again.

        The first time for a key, `work` runs as it is (that compiles its kernels) and is then captured: it must not
        mind being done twice, and must not wait for the device.
        """
        if key in self._captured:
            graph, result = self._captured[key]
            graph.replay()
            return result
        result = work()
        if self.refusal is None:
            start = time.perf_counter()
            try:
                self._captured[key] = self._capture(work)
            except RuntimeError as error:
                self.refusal = str(error).split("\n", 1)[0]
                log.warning(
                    "decoding goes on without CUDA graphs, which is slow: the model cannot be captured (%s); graphs "
                    "'off' says so beforehand",
                    self.refusal,
                )
            else:
                log.info("decode graph %s captured in %.2f s", key, time.perf_counter() - start)
        return result

    def forget(self) -> None:
        """Let go of all graphs: what they read lies somewhere else now."""
        torch.cuda.synchronize(self._stream.device)  # one of them may be running
        self._captured.clear()

    def _capture(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Not torch.cuda.graph(): it collects garbage and empties the allocator's cache, each time.
        graph = torch.cuda.CUDAGraph()
        outside = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(outside)
        # cuBLAS keeps 32 MiB for each thread and stream that it has worked for, for good. What it takes in a capture is
        # of the graphs' pool, and must be given back to it, or the pool outlives its graphs.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.stream(self._stream):
            # Only this thread's calls count: other engines may run beside it.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                result = work()
            finally:
                graph.capture_end()
                torch._C._cuda_clearCublasWorkspaces()
        outside.wait_stream(self._stream)
        return graph, result
