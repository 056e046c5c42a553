"""Rotary position embedding, in interleaved pairs as DeepSeek checkpoints store them, and two ways to longer contexts.

The rotation itself is the operator `rotary` of deepwright_kernels; here are the angles. Equations: Su et al. 2021
(RoPE); Peng et al. 2023 (YaRN: "NTK by parts" and the attention temperature); Llama 3.1's scaling has no paper of its
own, only published code.

Frequencies are computed as the published models compute them, operation by operation in float32: one rounding
elsewhere is 0.015 radians at position 131,072.

Shapes: M positions of the table, R rotated width, F = R / 2 pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .config import Llama3RopeConfig, RopeConfig, YarnConfig
from .precision import WideBuffers


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1: how much YaRN sharpens attention when the context grows by `factor`."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(head_dim: int, rope: RopeConfig) -> float:
    """head_dim^-0.5, times YaRN's mscale² (1.874 for V3: factor 40)."""
    scale = head_dim**-0.5
    if rope.yarn is not None:
        scale *= yarn_mscale(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    return scale


def _pair_turning(rotations: float, dim: int, theta: float, original_positions: int) -> float:
    """The (fractional) pair index that makes `rotations` full turns over the original context."""
    return dim * math.log(original_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_frequencies(periods_F: Tensor, dim: int, theta: float, yarn: YarnConfig) -> Tensor:
    """Pairs that turn often keep their frequency, pairs that turn rarely are slowed by `factor`, a ramp between."""
    low = max(math.floor(_pair_turning(yarn.beta_fast, dim, theta, yarn.original_positions)), 0)
    high = min(math.ceil(_pair_turning(yarn.beta_slow, dim, theta, yarn.original_positions)), dim - 1)
    ramp_F = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    kept_F = 1 - ramp_F
    return 1.0 / (yarn.factor * periods_F) * (1 - kept_F) + 1.0 / periods_F * kept_F


def _llama3_frequencies(frequencies_F: Tensor, llama3: Llama3RopeConfig) -> Tensor:
    """Pairs with more than `high_freq_factor` turns in the original context keep their frequency, pairs with fewer than
    `low_freq_factor` are slowed by `factor`, a blend between. The softmax scale stays as it is."""
    lengths_F = 2 * math.pi / frequencies_F
    blend_F = (llama3.original_positions / lengths_F - llama3.low_freq_factor) / (
        llama3.high_freq_factor - llama3.low_freq_factor
    )
    blended_F = (1 - blend_F) * frequencies_F / llama3.factor + blend_F * frequencies_F
    slowed_F = torch.where(
        lengths_F > llama3.original_positions / llama3.low_freq_factor, frequencies_F / llama3.factor, blended_F
    )
    return torch.where(lengths_F < llama3.original_positions / llama3.high_freq_factor, frequencies_F, slowed_F)


class Rotary(WideBuffers):
    """Tables of cos and sin for every position, float32 whatever the weights are, not saved with them."""

    cos_MF: Tensor
    sin_MF: Tensor

    def __init__(self, dim: int, config: RopeConfig, max_positions: int) -> None:
        super().__init__()
        self.dim, self.config, self.max_positions = dim, config, max_positions
        cos_MF, sin_MF = self._tables()
        self.register_buffer("cos_MF", cos_MF, persistent=False)
        self.register_buffer("sin_MF", sin_MF, persistent=False)

    def _tables(self) -> tuple[Tensor, Tensor]:
        periods_F = self.config.theta ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim)
        frequencies_F = 1.0 / periods_F
        attention_factor = 1.0
        yarn, llama3 = self.config.yarn, self.config.llama3
        if llama3 is not None:
            frequencies_F = _llama3_frequencies(frequencies_F, llama3)
        if yarn is not None:
            frequencies_F = _yarn_frequencies(periods_F, self.dim, self.config.theta, yarn)
            attention_factor = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        angles_MF = torch.arange(self.max_positions, dtype=torch.float32)[:, None] * frequencies_F
        return angles_MF.cos() * attention_factor, angles_MF.sin() * attention_factor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [..., F] for integer positions [...]."""
        return self.cos_MF[positions], self.sin_MF[positions]
