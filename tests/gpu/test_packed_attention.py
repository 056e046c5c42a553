"""Attention compiled on a GPU at DeepSeek's widths: against the reference, in CUDA graphs and under torch.compile."""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import backend_for, configure, context_attention, dispatch, packed_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]
SCALE = 192**-0.5


def relative(have: Tensor, want: Tensor) -> float:
    return float((have.detach().float() - want.detach().float()).norm() / want.detach().float().norm())


def drawn(batch: int, size: int, heads: int, kv_heads: int, widths: tuple[int, int] = (192, 128)) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((heads, widths[0]), (kv_heads, widths[0]), (kv_heads, widths[1]))
    return [torch.randn(batch, size, *shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]


def packed_starts(batch: int, size: int) -> Tensor:
    edges = torch.randint(1, size, (batch, 8), device="cuda").sort(1).values
    index = torch.arange(size, device="cuda").expand(batch, size).contiguous()
    after = torch.searchsorted(edges, index, right=True)
    return torch.nn.functional.pad(edges, (1, 0)).gather(1, after)


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize("packed", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "widths", "size"),
    [(4, 4, (192, 128), 2048), (8, 2, (128, 128), 1000), (4, 4, (64, 64), 777), (2, 2, (256, 256), 300)],
)
def test_output_and_gradients(
    heads: int, kv_heads: int, widths: tuple[int, int], size: int, packed: bool, backend: str
) -> None:
    q, k, v = drawn(2, size, heads, kv_heads, widths)
    starts = packed_starts(2, size) if packed else None
    if backend == "cuda" and (torch.cuda.get_device_capability() != (9, 0) or max(widths) > 192):
        pytest.skip("these kernels are for Hopper, and for widths up to 192")
    upstream = torch.randn(2, size, heads, widths[1], device="cuda").bfloat16()
    want = dispatch.load("packed_attention", "reference")(q, k, v, starts, widths[0] ** -0.5)
    with configure({"packed_attention": backend}):
        have = packed_attention(q, k, v, starts, widths[0] ** -0.5)
        gradients = torch.autograd.grad(have, (q, k, v), upstream)
    assert relative(have, want) < 5e-3
    for a, b in zip(gradients, torch.autograd.grad(want, (q, k, v), upstream), strict=True):
        assert relative(a, b) < 8e-3


def test_packed_rows_take_the_kernel_and_give_the_same_bits_every_time() -> None:
    q, k, v = drawn(2, 1500, 4, 4)
    starts = packed_starts(2, 1500)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    assert backend_for("packed_attention", q, k, v, starts, SCALE) == ("cuda" if hopper else "triton")
    upstream = torch.randn(2, 1500, 4, 128, device="cuda").bfloat16()
    first, second = (
        torch.autograd.grad(packed_attention(q, k, v, starts, SCALE), (q, k, v), upstream) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_torch_compile() -> None:
    q, k, v = drawn(1, 512, 4, 4)
    starts = packed_starts(1, 512)
    upstream = torch.randn(1, 512, 4, 128, device="cuda").bfloat16()
    for chosen in (None, starts):
        compiled = torch.compile(lambda *t, chosen=chosen: packed_attention(*t, chosen, SCALE), fullgraph=True)
        have, want = compiled(q, k, v), packed_attention(q, k, v, chosen, SCALE)
        torch.testing.assert_close(have, want, atol=2e-2, rtol=2e-2)
        pairs = (torch.autograd.grad(out, (q, k, v), upstream) for out in (have, want))
        for a, b in zip(*pairs, strict=True):
            assert relative(a, b) < 8e-3


@torch.no_grad()
def test_in_a_cuda_graph() -> None:
    q, k, v = drawn(1, 600, 4, 4)
    starts = packed_starts(1, 600)
    want = packed_attention(q, k, v, starts, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = packed_attention(q, k, v, starts, SCALE)
    out.zero_()
    graph.replay()
    assert torch.equal(out, want)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("step", [1024, 100_000], ids=["slices", "one slice"])
@torch.no_grad()
def test_new_tokens_over_a_long_context(step: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("these kernels are for Hopper")
    from deepwright_kernels.context_attention import slices

    monkeypatch.setattr(slices, "SHORTEST_SLICE", step)
    monkeypatch.setattr(slices, "SLICE_VALUES", 0)
    lengths, new, size = torch.tensor([4000, 700], device="cuda"), 500, 4096
    _, k, v = (t.detach() for t in drawn(2, size, 4, 4))
    q = torch.randn(2, new, 4, 192, device="cuda").bfloat16()
    beyond = torch.arange(size, device="cuda") >= lengths[:, None]
    k[beyond], v[beyond] = torch.nan, torch.nan
    positions = lengths[:, None] - new + torch.arange(new, device="cuda")
    arguments = (q, lambda begin, end: (k[:, begin:end], v[:, begin:end]), size, positions, lengths, SCALE)
    for starts in (None, (positions - 300).clamp(min=0)):
        want = dispatch.load("context_attention", "reference")(*arguments, starts)
        with configure({"context_attention": backend}):
            assert relative(context_attention(*arguments, starts), want) < 5e-3


@torch.no_grad()
def test_a_few_tokens_of_many_sequences() -> None:
    """As grouped-query attention decodes."""
    _, k, v = (t.detach() for t in drawn(16, 300, 8, 2, (128, 128)))
    lengths = torch.randint(1, 300, (16,), device="cuda")
    q = torch.randn(16, 1, 8, 128, device="cuda").bfloat16()
    expand = lambda begin, end: (k[:, begin:end], v[:, begin:end])  # noqa: E731
    arguments = (q, expand, 300, lengths[:, None] - 1, lengths, 128**-0.5)
    want = dispatch.load("context_attention", "reference")(*arguments, None)
    assert relative(context_attention(*arguments), want) < 5e-3
