"""Block-scaled FP8 against the code with which transformers reads and writes such checkpoints.

It knows whole blocks only; partial ones are in tests/kernels.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_kernels import dequantise_fp8_blocks, quantise_fp8_blocks

theirs = pytest.importorskip("transformers.integrations.finegrained_fp8")


def quantiser(scale_format: str = "float") -> Any:
    """As much of their quantiser as the conversions look at."""
    return SimpleNamespace(
        quantization_config=SimpleNamespace(weight_block_size=[128, 128], scale_fmt=scale_format), pre_quantized=True
    )


def matrix() -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(256, 384, generator=draw) * 10 ** torch.randn(256, 1, generator=draw)


def test_their_dequantisation_of_what_we_quantise() -> None:
    values, scales = quantise_fp8_blocks(matrix())
    found = theirs.Fp8Dequantize(quantiser()).convert({"weight": [values], "weight_scale_inv": [scales]})["weight"]
    assert torch.equal(dequantise_fp8_blocks(values, scales, dtype=torch.float32), found.float())


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
def test_our_dequantisation_of_what_they_quantise(scale_format: str) -> None:
    found = theirs.Fp8Quantize(quantiser(scale_format)).convert({"x.weight": matrix()})
    values, scales = found["x.weight"], found["x.weight_scale_inv"]
    again = theirs.Fp8Dequantize(quantiser(scale_format)).convert({"weight": [values], "weight_scale_inv": [scales]})
    assert torch.equal(dequantise_fp8_blocks(values, scales, dtype=again["weight"].dtype), again["weight"])


@pytest.mark.parametrize("scale_format", ["float", "ue8m0"])
def test_quantisation(scale_format: str) -> None:
    """Powers of two are the same to the bit; other scales are computed in another order and differ in the last bit."""
    found = theirs.Fp8Quantize(quantiser(scale_format)).convert({"x.weight": matrix()})
    values, scales = quantise_fp8_blocks(matrix(), power_of_two_scales=scale_format == "ue8m0")
    want = found["x.weight_scale_inv"].float()
    torch.testing.assert_close(scales, want, rtol=0 if scale_format == "ue8m0" else 2e-7, atol=0)
    assert torch.equal(values.float(), found["x.weight"].float())
