"""`init`: a model directory takes the place of a model section, and of the stages that would have made such a model.

`model.init=DIR` (or `distill.student.init=DIR`) names a directory, or, as everywhere, a run id or a registered model
(`model.init=deepwright@candidate`); the saved configuration names the directory. The section then says what the
directory's config.json says, so that checks, `--cfg` and the saved configuration speak of the model that is used. What
a recipe says of the model is replaced; what the command line says beside it contradicts, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepwright_core.errors import RequestError
from deepwright_core.finetune.start import read_start
from deepwright_core.model.config import ModelConfig
from deepwright_core.registry import Registry

from .model_source import find_at
from .override_problems import key_of

MODEL = "model"
INIT = "init"


def model_sections(registry: Registry) -> Iterator[str]:
    """Where models stand in a configuration: the section `model`, and each stage's fields that are one."""
    yield MODEL
    for stage in registry.names("stage"):
        for name, field in registry.get("stage", stage).config.model_fields.items():
            if field.annotation is ModelConfig:
                yield f"{stage}.{name}"


def resolve(
    composed: Mapping[str, Any], overrides: Sequence[str], registry: Registry, saved: bool
) -> tuple[dict[str, Any], list[str]]:
    """The configuration with what the named directories say, and a sentence for each problem.

    saved: the configuration comes from a file that a run has written; the directories must still say the same.
    """
    problems: list[str] = []
    resolved = dict(composed)
    for place in model_sections(registry):
        section = _at(resolved, place)
        init = section.get(INIT) if isinstance(section, Mapping) else None
        if not init:
            continue
        if not isinstance(init, str):
            problems.append(f"{place}.{INIT} is {init!r}; expected a model directory, a run id or a registered model.")
            continue
        try:
            directory = find_at(init, *_tracker(composed)).directory.absolute()
            config = read_start(directory, registry)
        except RequestError as error:
            problems += [f"{place}.{INIT}: {problem}" for problem in error.problems]
            continue
        said = config.model_dump(mode="json")
        problems += _changed(section, said, place, directory) if saved else _refused(overrides, section, said, place)
        resolved = _with(resolved, place.split("."), {INIT: str(directory), **said})
    return resolved, problems


def _tracker(composed: Mapping[str, Any]) -> tuple[Path, str]:
    """Where runs are remembered, from a configuration that nobody has checked yet."""
    root, uri = _at(composed, "paths.root"), _at(composed, "tracking.uri")
    return Path(str(root or "runs")).expanduser().resolve(), str(uri or "")


def given_model(sections: Mapping[str, Any]) -> Path | None:
    """The directory of `model.init`, from the parsed sections."""
    model = sections.get(MODEL)
    return Path(model.init) if isinstance(model, ModelConfig) and model.init else None


def _refused(overrides: Sequence[str], section: Mapping[str, Any], said: Mapping[str, Any], place: str) -> list[str]:
    """Overrides that would change the model. One that says what the directory says anyway changes nothing."""
    problems = []
    for override in overrides:
        key = key_of(override)
        # `model/attention=mla` sets the section model.attention, `model@distill.student=tiny` the one after the @.
        path = key.partition("@")[2] or key.replace("/", ".")
        if path == f"{place}.{INIT}" or not f"{path}.".startswith(f"{place}."):
            continue
        inner = path[len(place) + 1 :]
        if inner and path == key and _at(section, inner) == _at(said, inner):
            continue
        problems.append(
            f"Override '{override}' changes {path}, which {place}.{INIT} decides: its weights have a shape already. "
            f"Leave out the one or the other."
        )
    return problems


def _changed(section: Mapping[str, Any], said: Mapping[str, Any], place: str, directory: Path) -> list[str]:
    return [
        f"{place}.{key} is {section.get(key)!r} in the saved configuration and {value!r} in {directory}, which has "
        f"changed since; name the directory as it was in {place}.{INIT}, or start anew with overrides."
        for key, value in said.items()
        if section.get(key) != value
    ]


def _at(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _with(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy with another value at a path."""
    inner = value if len(path) == 1 else _with(values[path[0]], path[1:], value)
    return {**values, path[0]: inner}
