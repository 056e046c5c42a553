"""The router as one CUDA kernel for Hopper (`hopper.cu`), with the Triton kernel's backward pass.

Shapes: T tokens, E experts, K choices.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..cuda_source import Kernel, kernel
from ..operation import Operation
from . import triton as portable

SOURCE = Path(__file__).with_name("hopper.cu")
LANES, ROWS = 8, 4  # of a row and of a warp
# Two blocks of a processor take its registers: at most 128 of them a thread.
THREADS, SHARING = 256, 2
# So many blocks form a cluster that routes a row in each eight lanes, and clears and sums the counts itself.
FEW_BLOCKS = 8
CLEARED_AT_ONCE = 64

_ready: dict[tuple[torch.device, int, int, bool], list[Tensor]] = {}


def _from_16_bytes(tensor: Tensor) -> Tensor:
    """The tensor where the kernel can read 16 bytes at a time; a copy only when it has to be one."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@cache
def _kernel(
    device: torch.device,
    experts: int,
    few: bool,
    biased: bool,
    top_k: int,
    sigmoid: bool,
    groups: int,
    top_groups: int,
    group_best: int,
    normalise: bool,
) -> tuple[Kernel, int]:
    """(kernel, blocks)."""
    defines = {
        "EXPERTS": experts,
        "GROUPS": groups if top_groups < groups else 1,
        "TOP_GROUPS": top_groups if top_groups < groups else 1,
        "GROUP_BEST": group_best,
        "TOP_K": top_k,
        "SIGMOID": int(sigmoid),
        "NORMALISE": int(normalise),
        "HAS_BIAS": int(biased),
        "THREADS": THREADS,
        "SHARING": 1 if few else SHARING,
        "FEW": FEW_BLOCKS if few else 0,
    }
    blocks = FEW_BLOCKS if few else SHARING * torch.cuda.get_device_properties(device).multi_processor_count
    # Counts and the bias; for each row of a warp its scores, keys, candidates and choice.
    shared_bytes = 8 * experts + THREADS // 32 * ROWS * (4 * experts + 416)
    return kernel(SOURCE, "route", defines, shared_bytes, device), blocks


def _cleared(experts: int, device: torch.device) -> Tensor:
    """Zeros to count in. One launch clears those of many calls; each is given out once, on the stream that made it."""
    if torch.cuda.is_current_stream_capturing():  # a graph clears its own each time it is replayed
        return torch.zeros(experts, dtype=torch.int64, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    ready = _ready.setdefault((device, stream, experts, torch.is_inference_mode_enabled()), [])
    if not ready:
        ready.extend(torch.zeros(CLEARED_AT_ONCE, experts, dtype=torch.int64, device=device))
    return ready.pop()


def _launch(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    sigmoid: bool,
    groups: int,
    top_groups: int,
    group_best: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    logits_TE = _from_16_bytes(logits_TE)
    device = logits_TE.device
    experts_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    weights_TK = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    scores_TE = torch.empty_like(logits_TE)
    few = tokens <= FEW_BLOCKS * THREADS // LANES
    counts_E = torch.empty(experts, dtype=torch.int64, device=device) if few else _cleared(experts, device)
    function, blocks = _kernel(
        device, experts, few, bias_E is not None, top_k, sigmoid, groups, top_groups, group_best, normalise
    )
    function.launch(
        (blocks, 1, 1),
        (THREADS, 1, 1),
        logits_TE,
        logits_TE if bias_E is None else _from_16_bytes(bias_E),
        experts_TK,
        weights_TK,
        scores_TE,
        counts_E,
        tokens,
        scaling,
    )
    return experts_TK, weights_TK, scores_TE, counts_E


_route = Operation("route_hopper", _launch)
_route.shapes(portable.shapes)
_route.gradients(portable.gradients, portable.keep)


def route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    scoring: str,
    groups: int,
    top_groups: int,
    group_best: int,
    normalise: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the operator's docstring."""
    return _route(logits_TE, bias_E, top_k, scoring == "sigmoid", groups, top_groups, group_best, normalise, scaling)
