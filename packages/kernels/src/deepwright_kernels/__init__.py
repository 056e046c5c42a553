"""Operators of DeepSeek-style models: a PyTorch reference and Triton kernels for each."""

from .dispatch import BackendWarning, add_backend, backend_for, choices, configure, operators
from .fp8_blocks import dequantise_fp8_blocks, quantise_fp8_blocks
from .fp8_grouped_matmul import fp8_grouped_matmul
from .fp8_grouped_outer import fp8_grouped_outer
from .fp8_linear import fp8_grouped_linear, fp8_linear
from .fp8_matmul import fp8_matmul
from .fp8_rows import quantise_fp8_columns, quantise_fp8_rows, quantise_fp8_rows_and_columns
from .fp8_swiglu import swiglu_backward_quantise_fp8, swiglu_quantise_fp8
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
    "fp8_grouped_linear",
    "fp8_grouped_matmul",
    "fp8_grouped_outer",
    "fp8_linear",
    "fp8_matmul",
    "grouped_linear",
    "linear_cross_entropy",
    "mla_paged_decode",
    "operators",
    "quantise_fp8_blocks",
    "quantise_fp8_columns",
    "quantise_fp8_rows",
    "quantise_fp8_rows_and_columns",
    "rms_norm",
    "rotary",
    "swiglu_backward_quantise_fp8",
    "swiglu_quantise_fp8",
]
