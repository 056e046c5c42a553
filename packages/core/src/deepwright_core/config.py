"""Validation of a whole composed configuration, before anything starts: every problem in one go.

Where a section's schema comes from: components (data, tokenizer, task, optimizer, schedule) from the registry, stages
from their own config models, the model from `ModelConfig`. Sections that belong to the workflow (paths, tracking, run)
are its own business and pass through.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from . import kernel_backends
from .errors import RequestError, did_you_mean
from .model.config import ModelConfig
from .model.fp8 import fp8_problems
from .model.precision import Precision
from .model.transformer import Transformer, build_model
from .registry import KINDS, Registry, parse
from .stage import Stage
from .training.machine import pick_device

WORKFLOW_SECTIONS = ("paths", "tracking", "run")
COMPONENT_SECTIONS = {kind.group: kind.name for kind in KINDS.values() if kind.group and "/" not in kind.group}


class Top(BaseModel):
    """The values that stand alone at the top of a config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(0, ge=0, lt=2**31)
    precision: Precision = "auto"
    threads: int = Field(0, ge=0, le=4096)


def validate(registry: Registry, composed: Mapping[str, Any]) -> dict[str, Any]:
    """Parsed sections by name; `RequestError` lists every problem found.

    A section is looked at on its own first. Only when all of them are well-formed are they looked at together, by
    each stage's `check`: the rest would only follow from the first.
    """
    stage_names = registry.names("stage")
    known = [*Top.model_fields, *WORKFLOW_SECTIONS, *COMPONENT_SECTIONS, "model", "kernels", *stage_names]
    problems = [
        f"{key} is not a section of the config. {did_you_mean(key, known)}" for key in composed if key not in known
    ]
    sections: dict[str, Any] = {key: composed[key] for key in WORKFLOW_SECTIONS if key in composed}

    def attempt(name: str, read: Any) -> None:
        try:
            sections[name] = read()
        except RequestError as error:
            problems.extend(error.problems)

    try:
        sections |= dict(parse(Top, {k: composed[k] for k in Top.model_fields if k in composed}, "", registry))
    except RequestError as error:
        problems += error.problems
    for key, kind in COMPONENT_SECTIONS.items():
        if key in composed:
            attempt(key, lambda key=key, kind=kind: registry.parse(kind, composed[key], key))
    attempt("kernels", lambda: kernel_backends.parse(composed.get("kernels") or {}))
    if "model" in composed:
        attempt("model", lambda: parse(ModelConfig, _mapping(composed, "model"), "model", registry))
    for name in stage_names:
        if name in composed:
            config = registry.get("stage", name).config
            attempt(name, lambda name=name, config=config: parse(config, _mapping(composed, name), name, registry))
    if problems:
        raise RequestError(problems)
    if sections.get("precision") == "fp8":
        for where, described in _models(sections).items():
            problems += fp8_problems(_on_meta(registry, described), pick_device(), where)
    if "finetune" in sections and "model" in sections:
        problems += sections["finetune"].problems(partial(_on_meta, registry, sections["model"]), "finetune")
    for name in stage_names:
        if name in sections:
            stage: Stage = registry.get("stage", name).build(sections[name])
            missing = [section for section in stage.sections if section not in sections]
            problems += [f"Stage {name} reads the section '{section}', which the config lacks." for section in missing]
            if not missing:
                problems += stage.check(sections)
    if problems:
        raise RequestError(problems)
    return sections


def _models(sections: Mapping[str, Any]) -> dict[str, ModelConfig]:
    """Every model that the sections describe, by its place: `model`, and what a stage has beside it."""
    found = {name: section for name, section in sections.items() if isinstance(section, ModelConfig)}
    for name, section in sections.items():
        if isinstance(section, BaseModel):
            found |= {f"{name}.{key}": value for key, value in section if isinstance(value, ModelConfig)}
    return found


def _on_meta(registry: Registry, config: ModelConfig) -> Transformer:
    """The model without memory for its weights. How many tokens there are does not matter here."""
    with torch.device("meta"):
        return build_model(registry, config.model_copy(update={"vocab_size": config.vocab_size or 1}))


def _mapping(composed: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(composed[key], Mapping):
        raise RequestError(f"{key} is {composed[key]!r}; expected a section with options.")
    return composed[key]
