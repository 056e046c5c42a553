"""Operators of DeepSeek-style models: a PyTorch reference and Triton kernels for each."""

from .dispatch import BackendWarning, add_backend, backend_for, choices, configure, operators
from .fp8_blocks import dequantise_fp8_blocks, quantise_fp8_blocks
from .grouped_linear import grouped_linear
from .linear_cross_entropy import linear_cross_entropy
from .mla_paged_decode import mla_paged_decode
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = [
    "BackendWarning",
    "add_backend",
    "backend_for",
    "choices",
    "configure",
    "dequantise_fp8_blocks",
    "grouped_linear",
    "linear_cross_entropy",
    "mla_paged_decode",
    "operators",
    "quantise_fp8_blocks",
    "rms_norm",
    "rotary",
]
