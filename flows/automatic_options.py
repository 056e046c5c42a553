"""Hydra options that nobody wrote: one for each registered component, from the defaults of its config model.

A component without a YAML is chosen by name all the same (`model/attention=linattn`), and every stage's section is
complete, so that a misspelt key is an error. A YAML of the same name wins: Hydra would merge the two.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from pydantic import BaseModel

from deepwright_core.model.config import ModelConfig
from deepwright_core.registry import KINDS, Component, ComponentOf, Registry
from deepwright_kernels import dispatch

from .initial_model import model_sections

ROOT_CONFIG = "deepwright"
STAGE_GROUP = "stage_defaults"
KERNELS_GROUP = "kernels"
SCHEMA_GROUP = "schema"


@dataclass(frozen=True)
class Derived:
    """What a config model's schema gives: default values, and the options that fill places with a group of their own.

    `choices` maps a field to the option's name. Such a place is left out of the values: Hydra would merge another
    choice into them, and keys of the one would be left over in the other.
    """

    values: dict[str, Any]
    choices: dict[str, str]


def derive(model: type[BaseModel], registry: Registry, group: str | None) -> Derived:
    """The defaults of a config model as plain data; fields without a default are missing ("???").

    A component inside it is written out with its own defaults, so that every key can be overridden.
    """
    values: dict[str, Any] = {}
    choices: dict[str, str] = {}
    for name, field in model.model_fields.items():
        if field.is_required():
            values[name] = MISSING
            continue
        value = _plain(field.get_default(call_default_factory=True, validated_data={}))
        mark = next((m for m in field.metadata if isinstance(m, ComponentOf)), None)
        if mark is not None and isinstance(value, dict):
            has_group = group is not None and KINDS[mark.kind].group == f"{group}/{name}"
            if has_group and value.keys() == {"name"} and value["name"] in registry.names(mark.kind):
                choices[name] = value["name"]
                continue
            if mark.many:
                value = {label: _whole(mark.kind, each, registry) for label, each in value.items()}
            else:
                value = _whole(mark.kind, value, registry)
        values[name] = value
    return Derived(values, choices)


def _whole(kind: str, part: Any, registry: Registry) -> Any:
    """A component's mapping with the defaults that it leaves out (as it is when nobody registered the component)."""
    if not isinstance(part, dict) or part.get("name") not in registry.names(kind):
        return part
    return {**derive(registry.get(kind, part["name"]).config, registry, None).values, **part}


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


def store(registry: Registry, has_yaml: Callable[[str, str], bool], chosen: Container[str]) -> None:
    """Put an option for each component into Hydra's store, and the root config that joins them to conf/config.yaml.

    chosen: groups that conf/config.yaml chooses from itself.
    """
    config_store = ConfigStore.instance()
    stages: list[str] = []
    choices: dict[str, str] = {}
    for component in registry:
        group = KINDS[component.kind].group
        if component.kind == "stage":
            stages.append(component.name)
            derived = derive(component.config, registry, component.name)
            choices.update({f"{component.name}/{field}": name for field, name in derived.choices.items()})
            _put(component, STAGE_GROUP, derived.values)
        elif group is not None:
            derived = derive(component.config, registry, group)
            values = {**derived.values, "name": component.name}
            inner: list[Any] = [{field: name} for field, name in derived.choices.items()]
            node = {"defaults": [*inner, "_self_"], **values} if inner else values
            if not has_yaml(group, component.name):
                _put(component, group, node)
    # A model is no component, but its keys should be as complete, wherever one stands.
    places = [place for place in model_sections(registry) if "model" in chosen]
    if places:
        values = {key: value for key, value in derive(ModelConfig, registry, None).values.items() if value != MISSING}
        config_store.store("model", values, group=SCHEMA_GROUP, provider="deepwright")
    # Schemas first, then conf/config.yaml with its groups and recipe: what is written wins over what is derived.
    defaults: list[Any] = [{f"{STAGE_GROUP}@{stage}": stage} for stage in stages]
    defaults += [{f"{SCHEMA_GROUP}@{place}": "model"} for place in places]
    defaults += [{group: name} for group, name in choices.items() if group not in chosen]
    # Every operator is a key, so that each can be overridden and a misspelt one is an error.
    for backend in (dispatch.AUTO, dispatch.REFERENCE):
        node = dict.fromkeys(dispatch.operators(), backend)
        config_store.store(backend, node, group=KERNELS_GROUP, provider="deepwright")
    if KERNELS_GROUP not in chosen:
        defaults.append({KERNELS_GROUP: dispatch.AUTO})
    config_store.store(name=ROOT_CONFIG, node={"defaults": [*defaults, "config", "_self_"]}, provider="deepwright")


def _put(component: Component, group: str, node: Mapping[str, Any]) -> None:
    ConfigStore.instance().store(component.name, dict(node), group=group, provider=component.provider.plugin)
