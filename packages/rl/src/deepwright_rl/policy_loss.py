"""The policy objective: clipped ratio against the policy that sampled, and the KL estimate against a reference.

Every loss here is a weighted sum over tokens, with weights that already hold the normalisation over the *whole*
optimizer batch: splitting the batch into micro-batches changes nothing.

Shapes: B samples, S token positions (those of a completion marked in mask_BS).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from deepwright_core.registry import ComponentConfig, Registry

Aggregation = Literal["sequence", "token", "constant"]

# Beyond this many nats per token two policies have nothing in common, and exp() only overflows.
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyBatch:
    """logp: of each token under the policy being trained (differentiable). old_logp: under the policy that sampled.
    reference_logp: under the reference (None when there is none). All float32, 0 outside mask_BS.
    advantages_B: one a sample. weights_BS: each token's share of the batch, 0 outside the mask."""

    logp_BS: Tensor
    old_logp_BS: Tensor
    reference_logp_BS: Tensor | None
    advantages_B: Tensor
    mask_BS: Tensor
    weights_BS: Tensor


@dataclass(frozen=True)
class PolicyTerms:
    """loss: scalar to minimise. Token sums for reports: clipped (count), tokens (count)."""

    loss: Tensor
    clipped: Tensor


PolicyLoss = Callable[[PolicyBatch], PolicyTerms]


def token_weights(mask_BS: Tensor, aggregation: Aggregation, samples: int, tokens: int, longest: int) -> Tensor:
    """Each token's share of the loss of an optimizer batch with `samples` samples and `tokens` completion tokens.

    sequence: 1/N · 1/|o_i| (GRPO). token: 1/Σ|o| (DAPO). constant: 1/(N · longest) (Dr. GRPO).
    """
    mask = mask_BS.float()
    if aggregation == "sequence":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * samples)
    if aggregation == "token":
        return mask / max(tokens, 1)
    return mask / (samples * longest)


def k3(logp_BS: Tensor, reference_logp_BS: Tensor) -> Tensor:
    """Estimate of KL(π ‖ reference) per token: exp(Δ) - Δ - 1 with Δ = log reference - log π (DeepSeekMath, eq. 4)."""
    delta = (reference_logp_BS - logp_BS).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
    return delta.exp() - delta - 1


class PolicyLossConfig(ComponentConfig):
    """Base of every policy loss's config: how tokens are weighed, how much the reference counts (0: none is kept)."""

    kl_coefficient: float = Field(0.0, ge=0)
    aggregation: Aggregation = "sequence"


class ClippedConfig(PolicyLossConfig):
    """min(r Â, clip(r, 1 - epsilon_low, 1 + epsilon_high) Â), less kl_coefficient · k3 (DeepSeekMath, eq. 3)."""

    name: str = "clipped"
    epsilon_low: float = Field(0.2, gt=0)
    epsilon_high: float = Field(0.2, gt=0)
    kl_coefficient: float = Field(0.001, ge=0)


def build_clipped(config: ClippedConfig) -> PolicyLoss:
    """Clipped importance ratio with a k3 penalty."""

    def loss(batch: PolicyBatch) -> PolicyTerms:
        log_ratio_BS = (batch.logp_BS - batch.old_logp_BS).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        ratio_BS = log_ratio_BS.exp()
        advantages_B1 = batch.advantages_B[:, None]
        clipped_BS = ratio_BS.clamp(1 - config.epsilon_low, 1 + config.epsilon_high)
        gain_BS = torch.minimum(ratio_BS * advantages_B1, clipped_BS * advantages_B1)
        cost_BS = -gain_BS
        if batch.reference_logp_BS is not None and config.kl_coefficient:
            cost_BS = cost_BS + config.kl_coefficient * k3(batch.logp_BS, batch.reference_logp_BS)
        hit_BS = (ratio_BS * advantages_B1 > clipped_BS * advantages_B1) & batch.mask_BS
        return PolicyTerms((cost_BS * batch.weights_BS).sum(), hit_BS.sum())

    return loss


def register(registry: Registry) -> None:
    registry.add("policy_loss", "clipped", config=ClippedConfig)(build_clipped)
