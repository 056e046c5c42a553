"""deepwright_mla as a plugin: what it registers."""

from deepwright_core.hookspecs import hookimpl
from deepwright_core.registry import Registry

from .latent_attention import MLAConfig, build_mla


@hookimpl
def deepwright_register(registry: Registry) -> None:
    registry.add("attention", "mla", config=MLAConfig)(build_mla)
