"""An RL algorithm is a choice of advantage and policy loss: GRPO and its relatives differ in nothing else here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from deepwright_core.registry import ComponentConfig, ComponentOf, Registry

from .advantage import Advantage
from .policy_loss import Aggregation, PolicyLoss


@dataclass(frozen=True)
class Algorithm:
    """needs_reference: whether the loss looks at the reference model."""

    advantage: Advantage
    policy_loss: PolicyLoss
    aggregation: Aggregation
    needs_reference: bool


class GRPOConfig(ComponentConfig):
    """Group relative policy optimisation (DeepSeekMath, section 4.1)."""

    name: str = "grpo"
    advantage: Annotated[dict[str, Any], ComponentOf("advantage")] = {"name": "group_normalised"}
    policy_loss: Annotated[dict[str, Any], ComponentOf("policy_loss")] = {"name": "clipped"}


class DrGRPOConfig(GRPOConfig):
    """GRPO without its two biases: no division by the group's spread, constant length (Liu et al. 2025)."""

    name: str = "dr_grpo"
    advantage: Annotated[dict[str, Any], ComponentOf("advantage")] = {"name": "group_centred"}
    policy_loss: Annotated[dict[str, Any], ComponentOf("policy_loss")] = {
        "name": "clipped",
        "aggregation": "constant",
        "kl_coefficient": 0.0,
    }


class DAPOConfig(GRPOConfig):
    """GRPO with a higher upper clip, the mean over the batch's tokens, and no KL (Yu et al. 2025); without its
    dynamic sampling, which draws until every group has unequal rewards."""

    name: str = "dapo"
    policy_loss: Annotated[dict[str, Any], ComponentOf("policy_loss")] = {
        "name": "clipped",
        "epsilon_high": 0.28,
        "aggregation": "token",
        "kl_coefficient": 0.0,
    }


def build_with(registry: Registry) -> Callable[[GRPOConfig], Algorithm]:
    """The builder of all of them, bound to the registry that knows advantages and losses."""

    def build(config: GRPOConfig) -> Algorithm:
        loss = registry.parse("policy_loss", config.policy_loss)
        return Algorithm(
            registry.build("advantage", config.advantage),
            registry.build("policy_loss", config.policy_loss),
            loss.aggregation,
            loss.kl_coefficient > 0,
        )

    return build


def register(registry: Registry) -> None:
    for config in (GRPOConfig, DrGRPOConfig, DAPOConfig):
        name = config.model_fields["name"].default
        registry.add("algorithm", name, config=config)(build_with(registry))
