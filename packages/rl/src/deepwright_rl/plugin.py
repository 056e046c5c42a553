"""deepwright_rl as a plugin: what it registers."""

from deepwright_core.hookspecs import hookimpl
from deepwright_core.registry import Registry

from . import advantage, algorithm, policy_loss, reward, stage_distill, stage_rl


@hookimpl
def deepwright_register(registry: Registry) -> None:
    for part in (reward, advantage, policy_loss, algorithm, stage_rl, stage_distill):
        part.register(registry)
