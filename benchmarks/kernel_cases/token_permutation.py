"""Into expert order and back: the sort, and the moves, which read or write each row of tokens and of copies once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from deepwright_kernels import backend_for, dispatch, expert_order, permute, unpermute

from .case import BYTES, Case, Settings, applied, compiled, with_gradients

# tokens, experts, top_k, width, alignment: V3 and V2-Lite, for bf16 and for FP8; then a decoding step of V3.
ON_GPU = [
    (16384, 256, 8, 7168, 1),
    (16384, 64, 6, 2048, 1),
    (16384, 64, 6, 2048, 128),
    (128, 256, 8, 7168, 1),
]
ON_CPU = [(4096, 64, 6, 128, 1)]


def cases(settings: Settings) -> Iterator[Case]:
    for tokens, experts, top_k, width, alignment in ON_GPU if settings.gpu else ON_CPU:
        chosen_TK = torch.rand(tokens, experts, device=settings.device).topk(top_k, -1).indices
        shape = f"{tokens} x {top_k} of {experts}, width {width}, aligned {alignment}"
        arguments = (chosen_TK, experts, alignment)
        ordering = {"ours": expert_order, "eager": dispatch.load("expert_order", "reference")}
        backend = backend_for("expert_order", *arguments)
        copies = tokens * top_k
        # Read the experts, write the order and the places.
        yield Case("expert_order", shape, applied(ordering, *arguments), copies * 16, BYTES, backend)

        order = expert_order(*arguments)
        rows = len(order.order_R)
        x_TD = torch.randn(tokens, width, device=settings.device, dtype=settings.dtype, requires_grad=True)
        weights_TK = torch.rand(tokens, top_k, device=settings.device, requires_grad=True)
        row = width * x_TD.element_size()
        forms = {"ours": lambda x, order: permute(x, order)}
        for name, backend_name in (("eager", "reference"), ("gathers", "torch")):
            function = dispatch.load("permute", backend_name)
            forms[name] = lambda x, order, function=function: function(x, order.order_R, order.place_TK)
        if settings.compiled:
            forms["compile"] = compiled(forms["eager"])
        backend = backend_for("permute", x_TD, order.order_R, order.place_TK)
        moved = (tokens + rows) * row
        yield Case("permute", shape, applied(forms, x_TD.detach(), order), moved, BYTES, backend)
        y_RD = permute(x_TD.detach(), order).requires_grad_()
        training = with_gradients(forms, [x_TD], torch.randn_like(y_RD), x_TD, order)
        yield Case("permute + gradients", shape, training, moved + (tokens + copies) * row, BYTES, backend)

        back = {"ours": lambda y, order, weights: unpermute(y, order, weights)}
        for name, backend_name in (("eager", "reference"), ("gathers", "torch")):
            function = dispatch.load("unpermute", backend_name)
            back[name] = lambda y, order, weights, function=function: function(
                y, order.order_R, order.place_TK, weights
            )
        if settings.compiled:
            back["compile"] = compiled(back["eager"])
        backend = backend_for("unpermute", y_RD, order.order_R, order.place_TK, weights_TK)
        moved = (tokens + copies) * row
        constants = (y_RD.detach(), order, weights_TK.detach())
        yield Case("unpermute", shape, applied(back, *constants), moved, BYTES, backend)
        training = with_gradients(back, [y_RD, weights_TK], torch.randn_like(x_TD), y_RD, order, weights_TK)
        yield Case("unpermute + gradients", shape, training, moved + (tokens + copies + rows) * row, BYTES, backend)
