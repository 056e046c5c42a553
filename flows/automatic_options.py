"""Hydra options that nobody wrote: one for each registered component, from the defaults of its config model.

A component without a YAML is chosen by name all the same (`model/attention=linattn`), and every stage's section is
complete, so that a misspelt key is an error. A YAML of the same name wins: Hydra would merge the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from deepwright_core.registry import KINDS, Component, ComponentOf, Registry

ROOT_CONFIG = "deepwright"
STAGE_GROUP = "stage_defaults"


def defaults_of(model: type[BaseModel], registry: Registry) -> dict[str, Any]:
    """The default values of a config model as plain data; fields without a default are missing ("???").

    A component inside it is written out with its own defaults, so that every key can be overridden.
    """
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if field.default is PydanticUndefined and field.default_factory is None:
            values[name] = MISSING
        else:
            values[name] = _plain(field.get_default(call_default_factory=True, validated_data={}))
        for mark in field.metadata:
            if isinstance(mark, ComponentOf) and isinstance(values[name], dict):
                part = values[name]
                if mark.many:
                    values[name] = {label: _whole(mark.kind, each, registry) for label, each in part.items()}
                else:
                    values[name] = _whole(mark.kind, part, registry)
    return values


def _whole(kind: str, part: Any, registry: Registry) -> Any:
    """A component's mapping with the defaults that it leaves out (as it is when nobody registered the component)."""
    if not isinstance(part, dict) or part.get("name") not in registry.names(kind):
        return part
    return {**defaults_of(registry.get(kind, part["name"]).config, registry), **part}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def store(registry: Registry, has_yaml: Callable[[str, str], bool]) -> None:
    """Put an option for each component into Hydra's store, and the root config that joins them to conf/config.yaml."""
    config_store = ConfigStore.instance()
    stages: list[Component] = []
    for component in registry:
        group = KINDS[component.kind].group
        if component.kind == "stage":
            stages.append(component)
        elif group is not None and not has_yaml(group, component.name):
            values = {**defaults_of(component.config, registry), "name": component.name}
            config_store.store(name=component.name, node=values, group=group, provider=component.provider.plugin)
    for component in stages:
        if not has_yaml(STAGE_GROUP, component.name):
            values = defaults_of(component.config, registry)
            if "name" in component.config.model_fields:
                values["name"] = component.name
            config_store.store(name=component.name, node=values, group=STAGE_GROUP, provider=component.provider.plugin)
    # Schemas first, then conf/config.yaml with its groups and recipe: what is written wins over what is derived.
    defaults = [{f"{STAGE_GROUP}@{c.name}": c.name} for c in stages]
    config_store.store(name=ROOT_CONFIG, node={"defaults": [*defaults, "config", "_self_"]}, provider="deepwright")
