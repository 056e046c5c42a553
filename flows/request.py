"""What was asked for: a target and a config that has been composed and found valid, before anything is written.

The command line and the run form both come through `make`; it collects every problem of the overrides, of the
workflow's sections and of the components' sections, and raises them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepwright_core.errors import RequestError, did_you_mean
from deepwright_core.plugins import Plugins
from deepwright_core.stage import Stage

from . import compose, initial_model, plan, settings

PIPELINE = "pipeline"


@dataclass(frozen=True)
class Request:
    """A valid request.

    composed: plain data, as it is saved. sections: the same, parsed. stages: what to run, in order.
    """

    target: str
    overrides: tuple[str, ...]
    composed: Mapping[str, Any]
    sections: Mapping[str, Any]
    stages: tuple[Stage, ...]
    root: Path

    @property
    def run(self) -> settings.RunConfig:
        value = self.sections["run"]
        assert isinstance(value, settings.RunConfig)
        return value

    @property
    def tracking(self) -> settings.TrackingConfig:
        value = self.sections["tracking"]
        assert isinstance(value, settings.TrackingConfig)
        return value


def targets(plugins: Plugins) -> list[str]:
    """What `deepwright run` accepts."""
    return [PIPELINE, *plugins.registry.names("stage")]


def make(target: str, overrides: Sequence[str], plugins: Plugins, config_file: str = "") -> Request:
    """Compose and validate. Raises `RequestError` with all problems at once."""
    problems: list[str] = []
    if target not in targets(plugins):
        problems.append(f"There is no stage called '{target}'. {did_you_mean(target, targets(plugins))}")
    if config_file and overrides:
        problems.append("--config takes a resolved config as it is; give either --config or overrides, not both.")
    try:
        composed = compose.load_resolved(Path(config_file)) if config_file else compose.compose(overrides, plugins)
    except compose.ComposedWithProblems as error:
        composed, problems = error.composed, [*problems, *error.problems]
    except RequestError as error:
        raise RequestError([*problems, *error.problems]) from None
    composed, found = initial_model.resolve(composed, overrides, plugins.registry, saved=bool(config_file))
    problems += found
    sections, found = _validate(composed, plugins)
    problems += [p for p in found if p not in problems]
    if problems:
        raise RequestError(problems)
    run: settings.RunConfig = sections["run"]
    stages = plan.build(plugins.registry, sections)
    wanted = run.stages if target == PIPELINE else [target]
    for name in run.force:
        if name not in stages:
            problems.append(f"run.force names '{name}', and there is no such stage. {did_you_mean(name, stages)}")
    if problems:
        raise RequestError(problems)
    given = initial_model.given_model(sections)
    if given is not None:
        stages, wanted = plan.with_given_model(stages, wanted, given)
    root = Path(sections["paths"].root).expanduser().resolve()
    return Request(target, tuple(overrides), composed, sections, tuple(plan.order(stages, wanted)), root)


def _validate(composed: dict[str, Any], plugins: Plugins) -> tuple[dict[str, Any], list[str]]:
    from deepwright_core.config import validate

    composed = _without_missing(composed)
    sections, problems = settings.parse_sections(composed, plugins.registry)
    try:
        components = validate(
            plugins.registry, {key: value for key, value in composed.items() if key not in settings.SECTIONS}
        )
    except RequestError as error:
        return sections, [*problems, *error.problems]
    return {**components, **sections}, problems


def _without_missing(value: Any) -> Any:
    """Values still marked as missing ("???") left out: validation then says that they are missing."""
    if isinstance(value, dict):
        return {key: _without_missing(item) for key, item in value.items() if item != "???"}
    return value
