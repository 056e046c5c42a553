"""deepwright_moe as a plugin: what it registers."""

from deepwright_core.hookspecs import hookimpl
from deepwright_core.registry import Registry

from .mixture import MoEConfig, build_moe_with
from .router import RouterConfig, build_router
from .softmax_router import SoftmaxRouterConfig, build_softmax_router


@hookimpl
def deepwright_register(registry: Registry) -> None:
    registry.add("router", "noaux_tc", config=RouterConfig)(build_router)
    registry.add("router", "group_limited_greedy", config=SoftmaxRouterConfig)(build_softmax_router)
    registry.add("ffn", "moe", config=MoEConfig)(build_moe_with(registry))
