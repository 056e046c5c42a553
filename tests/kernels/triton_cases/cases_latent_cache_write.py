"""The writer of the latent cache: kernel against reference."""

import pytest
import torch
from torch import Tensor

from deepwright_kernels import dispatch, latent_cache_write
from deepwright_kernels.mla_paged_decode.reference import fp8_row_bytes, unpack_fp8_latents

from .sides import DEVICE, TOLERANCE, draw

SLOTS = 12


def written(cache_NW: Tensor, tokens: int, latent: int, rope: int, dtype: torch.dtype) -> list[Tensor]:
    """The cache after the reference and after the kernel; the input is a slice, and the angles' rows lie apart."""
    kv_TW = draw(tokens, latent + rope + 5, dtype=dtype)[:, : latent + rope]
    angle_TF = draw(tokens, rope)[:, : rope // 2]
    slots_T = torch.randperm(SLOTS, device=DEVICE)[:tokens]
    arguments = (kv_TW, draw(latent), 1e-6, angle_TF.cos(), angle_TF.sin())
    caches = [cache_NW.clone() for _ in range(2)]
    for backend, cache in zip(("reference", "triton"), caches, strict=True):
        dispatch.load("latent_cache_write", backend)(*arguments, cache, slots_T)
    return caches


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "latent", "rope"), [(7, 24, 6), (1, 512, 64), (5, 32, 2), (0, 16, 4)])
def test_a_cache_of_floats(tokens: int, latent: int, rope: int, dtype: torch.dtype) -> None:
    for cache_dtype in (dtype, torch.float32):
        before = draw(SLOTS, latent + rope, dtype=cache_dtype)
        want, have = written(before, tokens, latent, rope, dtype)
        torch.testing.assert_close(have, want, **TOLERANCE[dtype])
        assert (have != before).any(1).sum() == tokens


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("tokens", "latent", "rope"), [(7, 128, 6), (3, 512, 64), (5, 384, 2)])
def test_a_cache_of_fp8_latents(tokens: int, latent: int, rope: int, dtype: torch.dtype) -> None:
    before = torch.full((SLOTS, fp8_row_bytes(latent, rope)), 255, dtype=torch.uint8, device=DEVICE)
    want, have = written(before, tokens, latent, rope, dtype)
    assert (have != before).any(1).sum() == tokens
    rows_T = (have != before).any(1)
    (have_TC, have_TR), (want_TC, want_TR) = (unpack_fp8_latents(cache[rows_T], latent) for cache in (have, want))
    torch.testing.assert_close(have_TR, want_TR, rtol=0.02, atol=0.02)
    # Squares summed in another order may tip a value to its neighbour in e4m3; the interpreter's bfloat16 truncates.
    torch.testing.assert_close(have_TC, want_TC, rtol=0.13, atol=0.01)
    share = 0.9 if DEVICE == "cpu" and dtype == torch.bfloat16 else 0.99
    assert torch.isclose(have_TC, want_TC, rtol=0.01, atol=1e-3).float().mean() > share


def test_zeros_and_huge_values_in_fp8() -> None:
    latent, rope = 128, 2
    kv_TW, none_TF = torch.zeros(3, latent + rope, device=DEVICE), torch.zeros(3, 1, device=DEVICE)
    kv_TW[1] = 1e18
    cache_NW = torch.zeros(4, fp8_row_bytes(latent, rope), dtype=torch.uint8, device=DEVICE)
    slots_T = torch.arange(3, device=DEVICE, dtype=torch.int32)
    latent_cache_write(kv_TW, torch.ones(latent, device=DEVICE), 1e-6, none_TF + 1, none_TF, cache_NW, slots_T)
    latent_NC, rope_NR = unpack_fp8_latents(cache_NW, latent)
    assert torch.equal(latent_NC[[0, 2, 3]], torch.zeros_like(latent_NC[:3]))
    torch.testing.assert_close(latent_NC[1].float(), torch.ones(latent, device=DEVICE), rtol=0.01, atol=0)
    torch.testing.assert_close(rope_NR[1].float(), torch.full((rope,), 1e18, device=DEVICE), rtol=0.01, atol=0)


def test_keeps_torchs_rules() -> None:
    torch.library.opcheck(
        torch.ops.deepwright.latent_cache_write.default,
        (draw(2, 6), draw(4), 1e-6, draw(2, 1), draw(2, 1), draw(3, 6), torch.tensor([0, 2], device=DEVICE)),
        test_utils=("test_schema", "test_faketensor"),
    )
