"""The writer of the latent cache against norm and rotation by hand, and its FP8 rows against the published layout."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deepwright_kernels import configure, latent_cache_write, mla_paged_decode, rms_norm, rotary

LATENT, ROPE, SLOTS = 128, 6, 9


@pytest.fixture(params=["reference", "torch"], autouse=True)
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with configure({"latent_cache_write": request.param}):
        yield


def tokens(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, float, Tensor, Tensor]:
    torch.manual_seed(0)
    angle_TF = torch.randn(count, ROPE // 2)
    return torch.randn(count, LATENT + ROPE).to(dtype) * 3, torch.randn(LATENT), 1e-6, angle_TF.cos(), angle_TF.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
def test_writes_the_slots_and_no_others(dtype: torch.dtype, slot_dtype: torch.dtype) -> None:
    kv_TW, weight_C, eps, cos_TF, sin_TF = tokens(3, dtype)
    cache_NW = torch.full((SLOTS, LATENT + ROPE), torch.nan, dtype=dtype)
    slots_T = torch.tensor([7, 2, 5], dtype=slot_dtype)
    latent_cache_write(kv_TW, weight_C, eps, cos_TF, sin_TF, cache_NW, slots_T)
    latent_TC, rope_TF = (
        kv_TW[:, :LATENT].double(),
        torch.view_as_complex(kv_TW[:, LATENT:].double().unflatten(1, (-1, 2))),
    )
    normed_TC = latent_TC / (latent_TC.square().mean(1, keepdim=True) + eps).sqrt() * weight_C
    turned_TR = torch.view_as_real(rope_TF * torch.complex(cos_TF, sin_TF)).flatten(1)
    tolerance = {"rtol": 0.01, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(cache_NW[[7, 2, 5]].double(), torch.cat([normed_TC, turned_TR], 1), **tolerance)
    assert cache_NW[[0, 1, 3, 4, 6, 8]].isnan().all()


def test_a_row_of_fp8_latents_is_values_scales_and_rope() -> None:
    """128 e4m3 values, one float32 scale (amax / 448), 6 bfloat16: 144 bytes."""
    kv_TW, weight_C, eps, cos_TF, sin_TF = tokens(2, torch.bfloat16)
    cache_NW = torch.zeros(SLOTS, 144, dtype=torch.uint8)
    latent_cache_write(kv_TW, weight_C, eps, cos_TF, sin_TF, cache_NW, torch.tensor([4, 1]))
    latent_TC, rope_TR = rms_norm(kv_TW[:, :LATENT], weight_C, eps), rotary(kv_TW[:, LATENT:], cos_TF, sin_TF)
    for row, latent_C, rope_R in zip(cache_NW[[4, 1]], latent_TC.float(), rope_TR, strict=True):
        scale = row[128:132].view(torch.float32)
        torch.testing.assert_close(scale, latent_C.abs().amax()[None] / 448)
        values_C = row[:128].view(torch.float8_e4m3fn).float() * scale
        torch.testing.assert_close(values_C, latent_C, rtol=2**-4, atol=latent_C.abs().amax().item() / 448 * 2**-9)
        assert torch.equal(row[132:].view(torch.bfloat16), rope_R)
    assert not cache_NW[[0, 2, 3, 5, 6, 7, 8]].any()


def test_decode_reads_what_was_written() -> None:
    """One head whose query is along one token's latent: nearly all weight falls on it, and its latent comes back."""
    kv_TW, weight_C, eps, cos_TF, sin_TF = tokens(4, torch.bfloat16)
    outputs = []
    for cache_NW in (torch.zeros(8, LATENT + ROPE, dtype=torch.bfloat16), torch.zeros(8, 144, dtype=torch.uint8)):
        latent_cache_write(kv_TW, weight_C, eps, cos_TF, sin_TF, cache_NW, torch.arange(4, 8))
        query_BQHC = rms_norm(kv_TW[2, :LATENT], weight_C, eps)[None, None, None]
        one = torch.ones(1, dtype=torch.int64)
        outputs.append(
            mla_paged_decode(
                query_BQHC, torch.zeros(1, 1, 1, ROPE).bfloat16(), cache_NW, one[None], one[None] * 3, one * 4, 4, 1.0
            )
        )
    torch.testing.assert_close(outputs[0], query_BQHC, rtol=0.02, atol=0.02)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2**-4, atol=0.02)


def test_nothing_to_write() -> None:
    cache_NW = torch.ones(SLOTS, LATENT + ROPE)
    latent_cache_write(*tokens(0), cache_NW, torch.zeros(0, dtype=torch.int64))
    assert torch.equal(cache_NW, torch.ones_like(cache_NW))


def test_errors_name_the_argument() -> None:
    kv_TW, weight_C, eps, cos_TF, sin_TF = tokens(2)
    cache_NW, slots_T = torch.zeros(SLOTS, LATENT + ROPE), torch.tensor([1, 2])
    rest = (weight_C, eps, cos_TF, sin_TF, cache_NW, slots_T)
    with pytest.raises(ValueError, match=r"kv_TW has shape \[2, 133\]; expected \[T, C \+ R\] = \[2, 134\]"):
        latent_cache_write(kv_TW[:, 1:], *rest)
    with pytest.raises(ValueError, match="weight_C requires a gradient and a cache has none"):
        latent_cache_write(kv_TW, weight_C.clone().requires_grad_(), *rest[1:])
    with pytest.raises(ValueError, match=r"slots_T has shape \[1\]; expected \[T\] = \[2\]"):
        latent_cache_write(kv_TW, *rest[:-1], slots_T[:1])
    with pytest.raises(TypeError, match="slots_T is float32"):
        latent_cache_write(kv_TW, *rest[:-1], slots_T.float())
    with pytest.raises(ValueError, match=r"cache_NW has shape \[9, 143\]; expected .* = \[any, 144\]"):
        latent_cache_write(kv_TW, *rest[:-2], torch.zeros(SLOTS, 143, dtype=torch.uint8), slots_T)
    with pytest.raises(ValueError, match="weight_C has 64 latents and cache_NW takes them in FP8, 128 to a scale"):
        latent_cache_write(kv_TW[:, 64:], weight_C[:64], *rest[1:4], torch.zeros(SLOTS, 80, dtype=torch.uint8), slots_T)
    with pytest.raises(ValueError, match="cache_NW is not contiguous"):
        latent_cache_write(kv_TW, *rest[:-2], torch.zeros(SLOTS, 2 * (LATENT + ROPE))[:, ::2], slots_T)
    with pytest.raises(ValueError, match="eps is -1"):
        latent_cache_write(kv_TW, weight_C, -1.0, *rest[2:])
