"""The rotation on a GPU: queries of latent attention, whole and as a slice, with gradients."""

import pytest
import torch

from deepwright_kernels import dispatch, rotary, rotary_tail

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]


@pytest.mark.parametrize(("heads", "kept"), [(128, 0), (128, 128), (16, 128), (1, 512), (3, 40)])
def test_queries_and_keys_of_latent_attention(heads: int, kept: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1000, heads, kept + 64, device="cuda").bfloat16().requires_grad_()
    angle = torch.rand(2, 1000, 1, 32, device="cuda") * 1000
    cos, sin, upstream = angle.cos(), angle.sin(), torch.randn_like(x)
    have = rotary_tail(x, cos, sin)
    want = dispatch.load("rotary_tail", "reference")(x, cos, sin)
    torch.testing.assert_close(have, want, rtol=0.01, atol=1e-3)
    grads = [torch.autograd.grad(y, x, upstream)[0] for y in (have, want)]
    torch.testing.assert_close(*grads, rtol=0.02, atol=1e-2)
    torch.testing.assert_close(rotary(x[..., kept:], cos, sin), want[..., kept:], rtol=0.01, atol=1e-3)
    assert torch.equal(have[..., :kept], x[..., :kept])
