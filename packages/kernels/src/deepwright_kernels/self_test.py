"""Small real inputs for every operator, and a comparison of its backends with the reference on the present device.

Each operator has one function here that draws its arguments, as its backends take them, so small that all of it takes
seconds. A backend's results, and the gradients of those arguments that have one, are held against the reference's.
The error of a tensor is its largest deviation over the reference's largest value; whole numbers have to be equal.

Leaves out speed at real sizes (benchmarks/kernels.py) and odd shapes (the tests): this asks whether an installation,
its compiler and its device agree, and whether a backend that somebody added computes the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import dispatch

SEED = 20
TIMED_CALLS = 3
# Of the largest value: what two orders of summation, or one rounding more, may differ by.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


class Draw:
    """Random tensors on a device, the same ones every time; `dtype` is the one that models run in there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._generator = torch.Generator().manual_seed(SEED)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = False, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator) * scale
        return drawn.to(self.device, dtype or self.dtype).requires_grad_(grad)

    def below(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers from 0 to high − 1."""
        return torch.randint(high, shape, generator=self._generator).to(self.device, dtype)

    def order(self, size: int) -> Tensor:
        """A permutation."""
        return torch.randperm(size, generator=self._generator).to(self.device)

    def numbers(self, *values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """These numbers."""
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Inputs:
    """How an operator's arguments are drawn, and how far backends may be apart (None: by the dtype of the device).

    compared: the tensors to look at, from (result, arguments); by default all tensors of the result. An operator that
    writes into an argument names it here.
    """

    draw: Callable[[Draw], tuple[Any, ...]]
    tolerance: float | None
    compared: Callable[[Any, tuple[Any, ...]], Any]


INPUTS: dict[str, Inputs] = {}


def inputs(
    *names: str,
    tolerance: float | None = None,
    compared: Callable[[Any, tuple[Any, ...]], Any] = lambda result, arguments: result,
) -> Callable[[Callable[[Draw], tuple[Any, ...]]], Callable[[Draw], tuple[Any, ...]]]:
    """Declare the inputs of an operator, or of several that take the same."""

    def declare(draw: Callable[[Draw], tuple[Any, ...]]) -> Callable[[Draw], tuple[Any, ...]]:
        for name in names:
            INPUTS[name] = Inputs(draw, tolerance, compared)
        return draw

    return declare


@dataclass(frozen=True)
class Outcome:
    """What became of a backend: `reason` says why it cannot run here, `failure` what it raised."""

    operator: str
    backend: str
    reason: str | None = None
    failure: str | None = None
    error: float | None = None
    tolerance: float | None = None
    milliseconds: float | None = None

    @property
    def passed(self) -> bool | None:
        """None where there was nothing to test."""
        if self.reason is not None:
            return None
        return self.failure is None and self.error is not None and self.error <= (self.tolerance or 0.0)


def arguments_of(name: str, device: torch.device) -> tuple[Any, ...]:
    """Fresh arguments of an operator, the same ones every time; a tensor alone for one that has no inputs here."""
    draw = Draw(device)
    return INPUTS[name].draw(draw) if name in INPUTS else (draw(1),)


def run(name: str, device: torch.device) -> Iterator[Outcome]:
    """The operator's backends one after another, those that cannot run here included."""
    if name not in INPUTS:
        for backend in dispatch.operators()[name]:
            yield Outcome(name, backend, reason="whoever declared the operator gave no inputs for a self-test")
        return
    declared = INPUTS[name].tolerance
    tolerance = TOLERANCE[Draw(device).dtype] if declared is None else declared
    expected = _results(name, "reference", device)
    for backend, reason in dispatch.reasons(name, *arguments_of(name, device)).items():
        if reason is not None:
            yield Outcome(name, backend, reason=reason)
            continue
        try:
            error = _error(_results(name, backend, device), expected)
            milliseconds = _milliseconds(name, backend, device)
        except Exception as problem:  # whatever a backend does wrong is what is looked for
            yield Outcome(name, backend, failure=f"{type(problem).__name__}: {problem}".splitlines()[0].rstrip("."))
            continue
        yield Outcome(name, backend, error=error, tolerance=tolerance, milliseconds=milliseconds)


def _results(name: str, backend: str, device: torch.device) -> list[Tensor]:
    """The tensors to compare: results, then gradients."""
    arguments = arguments_of(name, device)
    leaves = [each for each in tree_leaves(arguments) if isinstance(each, Tensor) and each.requires_grad]
    result = dispatch.load(name, backend)(*arguments)
    found = [each for each in tree_leaves(INPUTS[name].compared(result, arguments)) if isinstance(each, Tensor)]
    roots = [each for each in found if each.requires_grad]
    gradients: tuple[Tensor, ...] = ()
    if leaves and roots:
        draw = Draw(device)
        gradients = torch.autograd.grad(roots, leaves, [draw(*root.shape, dtype=root.dtype) for root in roots])
    return [each.detach() for each in (*found, *gradients)]


def _error(have: list[Tensor], want: list[Tensor]) -> float:
    if [each.shape for each in have] != [each.shape for each in want]:
        raise ValueError(
            f"it gives tensors of {[list(each.shape) for each in have]}; "
            f"the reference gives {[list(each.shape) for each in want]}"
        )
    return max((_deviation(a, b) for a, b in zip(have, want, strict=True)), default=0.0)


def _deviation(have: Tensor, want: Tensor) -> float:
    if have.numel() == 0:
        return 0.0
    if not want.dtype.is_floating_point:
        return 0.0 if torch.equal(have, want.to(have.dtype)) else math.inf
    a, b = have.double(), want.double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs()).max()
    largest = torch.where(b.isfinite(), b.abs(), 0.0).max()
    return math.inf if not apart.isfinite() else float(apart / largest.clamp(min=1e-30))


def _milliseconds(name: str, backend: str, device: torch.device) -> float:
    """The best of a few calls without gradients; what is compiled has been compiled by then."""
    function, best = dispatch.load(name, backend), math.inf
    with torch.no_grad():
        for _ in range(TIMED_CALLS):
            arguments = arguments_of(name, device)
            _wait(device)
            began = time.perf_counter()
            function(*arguments)
            _wait(device)
            best = min(best, time.perf_counter() - began)
    return best * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reference(name: str, *arguments: Any) -> Any:
    """What an operator's reference gives: operands of another operator."""
    return dispatch.load(name, "reference")(*arguments)


@inputs("rms_norm")
def _rms_norm(draw: Draw) -> tuple[Any, ...]:
    return draw(37, 256, grad=True), draw(256, dtype=torch.float32, grad=True), 1e-6


@inputs("add_rms_norm")
def _add_rms_norm(draw: Draw) -> tuple[Any, ...]:
    return draw(37, 256, grad=True), draw(37, 256, grad=True), draw(256, dtype=torch.float32, grad=True), 1e-6


@inputs("rotary", "rotary_tail")
def _rotary(draw: Draw) -> tuple[Any, ...]:
    angle_SHF = draw(20, 1, 32, dtype=torch.float32)
    return draw(2, 20, 4, 64, grad=True), angle_SHF.cos(), angle_SHF.sin()


@inputs("latent_cache_write", compared=lambda result, arguments: arguments[5])
def _latent_cache_write(draw: Draw) -> tuple[Any, ...]:
    angle_TF = draw(20, 16, dtype=torch.float32)
    cache_NW = draw(128, 96)
    return (
        draw(20, 96),
        draw(64, dtype=torch.float32),
        1e-6,
        angle_TF.cos(),
        angle_TF.sin(),
        cache_NW,
        draw.order(128)[:20],
    )


@inputs("mla_paged_decode")
def _mla_paged_decode(draw: Draw) -> tuple[Any, ...]:
    sequences, queries, heads, latent, rope, block = 3, 2, 16, 512, 64, 64
    lengths_B = draw.numbers(150, 2, 64)
    positions_BQ = lengths_B[:, None] - queries + torch.arange(queries, device=draw.device)
    blocks_BP = draw.order(9).view(sequences, 3)
    q_latent, q_rope = draw(sequences, queries, heads, latent), draw(sequences, queries, heads, rope)
    return q_latent, q_rope, draw(9 * block, latent + rope), blocks_BP, positions_BQ, lengths_B, block, 192**-0.5


@inputs("packed_attention")
def _packed_attention(draw: Draw) -> tuple[Any, ...]:
    rows, size = 2, 80
    starts_BS = torch.where(torch.arange(size, device=draw.device) < 33, 0, 33).expand(rows, size).contiguous()
    q, k = draw(rows, size, 4, 192, grad=True), draw(rows, size, 4, 192, grad=True)
    return q, k, draw(rows, size, 4, 128, grad=True), starts_BS, 192**-0.5


@inputs("context_attention")
def _context_attention(draw: Draw) -> tuple[Any, ...]:
    lengths_B = draw.numbers(90, 37)
    positions_BQ = lengths_B[:, None] - 20 + torch.arange(20, device=draw.device)
    q_BQHK, k_BNGK, v_BNGV = draw(2, 20, 4, 192), draw(2, 90, 4, 192), draw(2, 90, 4, 128)
    expand = lambda begin, end: (k_BNGK[:, begin:end], v_BNGV[:, begin:end])  # noqa: E731
    return q_BQHK, expand, 90, positions_BQ, lengths_B, 192**-0.5, None


@inputs("route")
def _route(draw: Draw) -> tuple[Any, ...]:
    logits_TE, bias_E = draw(50, 32, dtype=torch.float32, grad=True), draw(32, dtype=torch.float32, scale=0.1)
    return logits_TE, bias_E, 4, "sigmoid", 4, 2, 2, True, 2.5


@inputs("expert_order")
def _expert_order(draw: Draw) -> tuple[Any, ...]:
    return draw.below(8, 50, 4), 8, 16


@inputs("permute")
def _permute(draw: Draw) -> tuple[Any, ...]:
    order_R, place_TK, *_ = _reference("expert_order", draw.below(8, 50, 4), 8, 16)
    return draw(50, 64, grad=True), order_R, place_TK


@inputs("unpermute")
def _unpermute(draw: Draw) -> tuple[Any, ...]:
    order_R, place_TK, *_ = _reference("expert_order", draw.below(8, 50, 4), 8, 16)
    return draw(len(order_R), 64, grad=True), order_R, place_TK, draw(50, 4, dtype=torch.float32, grad=True)


# What lies past the last expert's rows is nobody's, and torch's grouped product leaves it unwritten.
@inputs("grouped_swiglu", compared=lambda result, arguments: result[: int(arguments[4][-1])])
def _grouped_swiglu(draw: Draw) -> tuple[Any, ...]:
    order_R, place_TK, _counts_E, ends_E = _reference("expert_order", draw.below(8, 50, 4), 8, 16)
    return draw(50, 64, grad=True), draw(8, 96, 64, grad=True, scale=0.1), order_R, place_TK, ends_E


@inputs("grouped_linear")
def _grouped_linear(draw: Draw) -> tuple[Any, ...]:
    ends_E = draw.numbers(40, 40, 41, 120, dtype=torch.int32)
    return draw(120, 64, grad=True), draw(4, 96, 64, grad=True, scale=0.1), ends_E


# A rounding that falls the other way is one step of e4m3: 32 below the largest value of 448.
E4M3_STEP = 0.075


@inputs("quantise_fp8_blocks", tolerance=E4M3_STEP)
def _quantise_fp8_blocks(draw: Draw) -> tuple[Any, ...]:
    return draw(144, 272), (128, 128), False, True


@inputs("dequantise_fp8_blocks")
def _dequantise_fp8_blocks(draw: Draw) -> tuple[Any, ...]:
    return *_reference("quantise_fp8_blocks", draw(144, 272)), (128, 128), draw.dtype


@inputs("quantise_fp8_rows", "quantise_fp8_columns", "quantise_fp8_rows_and_columns", tolerance=E4M3_STEP)
def _quantise_fp8_rows(draw: Draw) -> tuple[Any, ...]:
    return draw(144, 272), False


@inputs("swiglu_quantise_fp8", tolerance=E4M3_STEP)
def _swiglu_quantise_fp8(draw: Draw) -> tuple[Any, ...]:
    return draw(144, 512), False


@inputs("swiglu_backward_quantise_fp8", tolerance=E4M3_STEP)
def _swiglu_backward_quantise_fp8(draw: Draw) -> tuple[Any, ...]:
    return draw(144, 256), draw(144, 512), False


def _rows(draw: Draw, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    values, scale = _reference("quantise_fp8_rows", draw(rows, columns), False)
    return values, scale


@inputs("fp8_matmul", tolerance=0.02)
def _fp8_matmul(draw: Draw) -> tuple[Any, ...]:
    weight = _reference("quantise_fp8_blocks", draw(256, 384))
    return *_rows(draw, 200, 384), *weight, torch.bfloat16


@inputs("fp8_grouped_matmul", tolerance=0.02)
def _fp8_grouped_matmul(draw: Draw) -> tuple[Any, ...]:
    weight = _reference("quantise_fp8_blocks", draw(3, 256, 384))
    return *_rows(draw, 384, 384), *weight, draw.numbers(128, 128, 384, dtype=torch.int32), torch.bfloat16


@inputs("fp8_grouped_outer", tolerance=0.02)
def _fp8_grouped_outer(draw: Draw) -> tuple[Any, ...]:
    ends_E = draw.numbers(128, 128, 384, dtype=torch.int32)
    return *_rows(draw, 256, 384), *_rows(draw, 128, 384), ends_E, torch.bfloat16


@inputs("linear_cross_entropy")
def _linear_cross_entropy(draw: Draw) -> tuple[Any, ...]:
    targets_T = draw.below(500, 40)
    targets_T[::5] = -100
    return draw(40, 64, grad=True), draw(500, 64, grad=True, scale=0.2), targets_T, -100, None, 0.8


@inputs("weighted_linear_cross_entropy")
def _weighted_linear_cross_entropy(draw: Draw) -> tuple[Any, ...]:
    targets_T = draw.below(500, 40)
    targets_T[::5] = -100
    token_weights_T = draw(40, dtype=torch.float32)
    return draw(40, 64, grad=True), draw(500, 64, grad=True, scale=0.2), targets_T, token_weights_T, -100, 0.8


# The polynomial's slope is above 3 at 0: five steps in bfloat16 enlarge what the first ones round.
@inputs("newton_schulz", tolerance=0.1)
def _newton_schulz(draw: Draw) -> tuple[Any, ...]:
    return draw(3, 48, 80), 5


@inputs("draw_tokens")
def _draw_tokens(draw: Draw) -> tuple[Any, ...]:
    rows = [
        torch.tensor([0.0, 0.7, 1.0, 1.5]).repeat(4),
        torch.tensor([1.0, 0.9]).repeat(8),
        torch.tensor([0.0, 0.0, 0.0, 0.05]).repeat_interleave(4),
    ]
    top_k_B = draw.numbers(*([0] * 8 + [40] * 8))
    seed_B, position_B = draw.below(1 << 40, 16), draw.below(1 << 20, 16)
    logits_BV = draw(16, 500, dtype=torch.float32, scale=3.0)
    return logits_BV, *(row.to(draw.device) for row in rows), top_k_B, seed_B, position_B, True, True
