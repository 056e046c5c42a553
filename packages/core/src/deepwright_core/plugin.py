"""deepwright_core as a plugin: what it registers."""

from .hookspecs import hookimpl
from .model.attention import GQAConfig, build_gqa
from .model.feed_forward import DenseConfig, build_dense
from .registry import Registry


@hookimpl
def deepwright_register(registry: Registry) -> None:
    registry.add("attention", "gqa", config=GQAConfig)(build_gqa)
    registry.add("ffn", "dense", config=DenseConfig)(build_dense)
