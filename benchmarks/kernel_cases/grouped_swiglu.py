"""The first half of the experts, from tokens to SwiGLU's result in expert order, and the whole of them, with the
projection down: fused, in steps whose moves are ours and whose products are torch's, and all in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

from deepwright_kernels import ExpertOrder, backend_for, dispatch, expert_order, grouped_linear, grouped_swiglu, permute

from .case import FLOPS, Case, Settings, applied, compiled, with_gradients

# tokens, top_k, experts, expert width, hidden: V2-Lite; V3's experts on one of 32 machines; V2-Lite decoding.
ON_GPU = [(4096, 6, 64, 1408, 2048), (4096, 8, 8, 2048, 7168), (128, 6, 64, 1408, 2048)]
ON_CPU = [(512, 4, 16, 64, 128)]


def _with_torch(x_TD: torch.Tensor, gate_up_EID: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    x_RD = x_TD[order.order_R // order.place_TK.shape[1]]
    product_RI = functional.grouped_mm(x_RD, gate_up_EID.transpose(-2, -1), offs=order.ends_E)
    gate_RI, up_RI = product_RI.chunk(2, -1)
    return functional.silu(gate_RI) * up_RI


def _in_steps(x_TD: torch.Tensor, gate_up_EID: torch.Tensor, order: ExpertOrder) -> torch.Tensor:
    multiply = dispatch.load("grouped_linear", "torch")
    gate_RI, up_RI = multiply(permute(x_TD, order), gate_up_EID, order.ends_E).chunk(2, -1)
    return functional.silu(gate_RI) * up_RI


def _both_halves(
    first: Callable[..., torch.Tensor], second: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    return lambda x_TD, gate_up_EID, down_EDI, order: second(first(x_TD, gate_up_EID, order), down_EDI, order.ends_E)


def cases(settings: Settings) -> Iterator[Case]:
    for tokens, top_k, experts, width, hidden in ON_GPU if settings.gpu else ON_CPU:
        x = torch.randn(tokens, hidden, device=settings.device, dtype=settings.dtype, requires_grad=True)
        weight = torch.randn(experts, 2 * width, hidden, device=settings.device) * 0.02
        weight = weight.to(settings.dtype).requires_grad_()
        order = expert_order(torch.rand(tokens, experts, device=settings.device).topk(top_k, -1).indices, experts)
        functions = {"ours": grouped_swiglu, "in steps": _in_steps, "torch": _with_torch}
        if settings.compiled and settings.gpu:
            functions["compile"] = compiled(_with_torch)
        work = 2 * tokens * top_k * 2 * width * hidden
        shape = f"{tokens} x {top_k} of {experts}, ({2 * width}, {hidden})"
        backend = backend_for("grouped_swiglu", x, weight, order.order_R, order.place_TK, order.ends_E)
        yield Case(
            "grouped_swiglu", shape, applied(functions, x.detach(), weight.detach(), order), work, FLOPS, backend
        )
        upstream = torch.randn(tokens * top_k, width, device=settings.device, dtype=settings.dtype)
        training = with_gradients(functions, [x, weight], upstream, x, weight, order)
        yield Case("grouped_swiglu + gradients", shape, training, 3 * work, FLOPS, backend)

        down = (torch.randn(experts, hidden, width, device=settings.device) * 0.02).to(settings.dtype).requires_grad_()
        by_torch = dispatch.load("grouped_linear", "torch")
        seconds = {name: grouped_linear if name == "ours" else by_torch for name in functions}
        whole = {name: _both_halves(first, seconds[name]) for name, first in functions.items()}
        upstream = torch.randn(tokens * top_k, hidden, device=settings.device, dtype=settings.dtype)
        training = with_gradients(whole, [x, weight, down], upstream, x, weight, down, order)
        backend += " and " + backend_for("grouped_linear", x.new_empty(tokens * top_k, width), down, order.ends_E)
        yield Case("experts + gradients", shape, training, 4.5 * work, FLOPS, backend)
