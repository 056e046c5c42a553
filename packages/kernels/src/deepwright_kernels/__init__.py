"""Operators of DeepSeek-style models: a PyTorch reference and Triton kernels for each."""

from .context_attention import context_attention
from .dispatch import BackendWarning, add_backend, backend_for, choices, configure, operators
from .draw_tokens import draw_tokens
from .fp8_blocks import dequantise_fp8_blocks, quantise_fp8_blocks
from .fp8_feed_forward import fp8_feed_forward, fp8_grouped_feed_forward
from .fp8_grouped_matmul import fp8_grouped_matmul
from .fp8_grouped_outer import fp8_grouped_outer
from .fp8_linear import fp8_grouped_linear, fp8_linear
from .fp8_matmul import fp8_matmul
from .fp8_rows import quantise_fp8_columns, quantise_fp8_rows, quantise_fp8_rows_and_columns
from .fp8_swiglu import swiglu_backward_quantise_fp8, swiglu_quantise_fp8
from .grouped_linear import grouped_linear
from .grouped_swiglu import grouped_swiglu
from .latent_cache_write import latent_cache_write
from .linear_cross_entropy import linear_cross_entropy, weighted_linear_cross_entropy
from .mla_paged_decode import mla_paged_decode
from .newton_schulz import newton_schulz
from .packed_attention import packed_attention
from .rms_norm import add_rms_norm, rms_norm
from .rotary import rotary, rotary_tail
from .route import Choice, route
from .token_permutation import ExpertOrder, expert_order, permute, unpermute

__all__ = [
    "BackendWarning",
    "Choice",
    "ExpertOrder",
    "add_backend",
    "add_rms_norm",
    "backend_for",
    "choices",
    "configure",
    "context_attention",
    "dequantise_fp8_blocks",
    "draw_tokens",
    "expert_order",
    "fp8_feed_forward",
    "fp8_grouped_feed_forward",
    "fp8_grouped_linear",
    "fp8_grouped_matmul",
    "fp8_grouped_outer",
    "fp8_linear",
    "fp8_matmul",
    "grouped_linear",
    "grouped_swiglu",
    "latent_cache_write",
    "linear_cross_entropy",
    "mla_paged_decode",
    "newton_schulz",
    "operators",
    "packed_attention",
    "permute",
    "quantise_fp8_blocks",
    "quantise_fp8_columns",
    "quantise_fp8_rows",
    "quantise_fp8_rows_and_columns",
    "rms_norm",
    "rotary",
    "rotary_tail",
    "route",
    "swiglu_backward_quantise_fp8",
    "swiglu_quantise_fp8",
    "unpermute",
    "weighted_linear_cross_entropy",
]
