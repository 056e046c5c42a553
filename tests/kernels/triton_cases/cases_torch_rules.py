"""What torch.library and torch.compile ask of the operators."""

import torch
from torch import Tensor

from deepwright_kernels import dispatch, rms_norm, rotary

from .sides import DEVICE, OPCHECKS, draw


def test_operators_keep_torchs_rules() -> None:
    for name in ("rms_norm", "rotary", "mla_paged_decode"):
        dispatch.load(name, "triton")  # which registers it
    ops = torch.ops.deepwright
    x, weight = draw(4, 6, grad=True), draw(6, grad=True)
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6), test_utils=OPCHECKS)
    torch.library.opcheck(ops.rotary.default, (x, draw(4, 3), draw(4, 3), False), test_utils=OPCHECKS)
    table = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
    torch.library.opcheck(
        ops.mla_paged_decode.default,
        (draw(1, 1, 2, 16), draw(1, 1, 2, 16), draw(8, 32), table, table, table[0], 4, 0.1),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_compiled_graph_goes_through_whole() -> None:
    x, weight, angle = draw(4, 6, grad=True), draw(6, grad=True), draw(4, 3)

    def model(x: Tensor, weight: Tensor) -> Tensor:
        return rotary(rms_norm(x, weight), angle.cos(), angle.sin()).square().sum()

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for have, want in zip(
        torch.autograd.grad(compiled(x, weight), (x, weight)),
        torch.autograd.grad(model(x, weight), (x, weight)),
        strict=True,
    ):
        torch.testing.assert_close(have, want)
