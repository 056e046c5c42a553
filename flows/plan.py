"""Which stages a target needs, and in which order; and what changes when a model is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepwright_core.errors import RequestError, did_you_mean
from deepwright_core.registry import Registry
from deepwright_core.stage import Stage


def build(registry: Registry, sections: Mapping[str, Any]) -> dict[str, Stage]:
    """Every registered stage, built from its section of the config."""
    return {name: registry.get("stage", name).build(sections.get(name)) for name in registry.names("stage")}


def with_given_model(
    stages: Mapping[str, Stage], wanted: Sequence[str], directory: Path
) -> tuple[dict[str, Stage], list[str]]:
    """The stages, and which of them are wanted, when a model is given.

    It goes to whoever of the wanted stages would otherwise be handed the model of a stage that is not wanted. A stage
    that makes models from nothing is not wanted where another would only go on from what it makes; wanted for itself,
    it goes on from the given model.
    """
    from_nothing = {name for name, stage in stages.items() if stage.start and stage.start not in stage.needs}
    makers = {stages[name].needs.get(stages[name].start) for name in wanted if name in stages}
    wanted = [name for name in wanted if name not in from_nothing & makers]

    def takes_it(stage: Stage) -> bool:
        if stage.name in from_nothing:
            return stage.name in wanted
        maker = stage.needs.get(stage.start)
        return maker is not None and maker not in wanted and (maker in from_nothing or stage.name in wanted)

    def given(stage: Stage) -> Stage:
        needs = {artifact: maker for artifact, maker in stage.needs.items() if artifact != stage.start}
        return replace(stage, needs=needs, given={**stage.given, stage.start: directory})

    return {name: given(stage) if takes_it(stage) else stage for name, stage in stages.items()}, wanted


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
