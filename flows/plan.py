"""Which stages a target needs, and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepwright_core.errors import RequestError, did_you_mean
from deepwright_core.registry import Registry
from deepwright_core.stage import Stage


def build(registry: Registry, sections: Mapping[str, Any]) -> dict[str, Stage]:
    """Every registered stage, built from its section of the config."""
    return {name: registry.get("stage", name).build(sections.get(name)) for name in registry.names("stage")}


def order(stages: Mapping[str, Stage], wanted: Sequence[str]) -> list[Stage]:
    """`wanted` and everything that they need, each after what it needs, otherwise in the order given."""
    ordered: dict[str, Stage] = {}
    path: list[str] = []

    def visit(name: str, asked_by: str) -> None:
        if name in ordered:
            return
        if name in path:
            raise RequestError(f"The stages {' -> '.join([*path[path.index(name) :], name])} need each other.")
        if name not in stages:
            raise RequestError(f"{asked_by} needs a stage '{name}', which does not exist. {did_you_mean(name, stages)}")
        path.append(name)
        for needed in dict.fromkeys(stages[name].needs.values()):
            visit(needed, f"Stage {name}")
        path.pop()
        ordered[name] = stages[name]

    for name in wanted:
        visit(name, "run.stages")
    return list(ordered.values())
