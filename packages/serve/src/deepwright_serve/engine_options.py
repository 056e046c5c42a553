"""How the engine is to serve a model, told once: fields of the serve stage, and options of the serve command.

Left out: what stands in a run's own sections (precision, threads), and what only a person at a server decides (device,
keys, limits, prices).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import click
from annotated_types import Ge, Le
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

from deepwright_core.engine import MAX_DRAFTS, CacheDtype
from deepwright_core.errors import RequestError

CACHE_TOKENS = 65536


class EngineOptions(BaseModel):
    """adapters: directories of LoRA adapters of the model, by the names that they answer to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_tokens: int = Field(
        CACHE_TOKENS,
        ge=64,
        description="tokens that the cache holds, of all prompts and answers together (of each replica)",
    )
    cache_dtype: CacheDtype = Field(
        "auto",
        description="auto: the weights'; fp8: the latents of latent attention in FP8, near the same answers in fewer "
        "bytes",
    )
    replicas: int = Field(
        1,
        ge=1,
        le=64,
        description="engines behind the one address, each on a GPU of its own (on a CPU they share the weights)",
    )
    speculate: int = Field(
        0,
        ge=0,
        le=MAX_DRAFTS,
        description="tokens that the model's MTP modules draft in a step: the same answers, in fewer steps",
    )
    expert_parallel: int = Field(
        1,
        ge=1,
        le=64,
        description="processes of this machine that the experts are spread over, each on a GPU of its own, behind one "
        "engine",
    )
    adapters: dict[str, str] = Field(
        {},
        description="LoRA adapters of the model, by the names that they answer to; an option for each",
    )
    batch_invariant: bool = Field(False, description="the same answer whatever runs beside it, at a cost in speed")

    def arguments(self) -> list[str]:
        """The options of `deepwright serve` that say the same."""
        said: list[str] = []
        for field in EngineOptions.model_fields:
            value = getattr(self, field)
            if isinstance(value, dict):
                said += [f"{_option(field)}={name}={Path(directory).resolve()}" for name, directory in value.items()]
            elif value is True:
                said.append(_option(field))
            elif value is not False:
                said.append(f"{_option(field)}={value}")
        return said


def _option(field: str) -> str:
    """What names several things is said once for each of them."""
    return "--adapter" if field == "adapters" else f"--{field.replace('_', '-')}"


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each field of `EngineOptions`."""
    for field, about in reversed(EngineOptions.model_fields.items()):
        command = click.option(_option(field), field, **_form(about), help=_sentence(about))(command)
    return command


def take_engine_options(options: dict[str, Any]) -> EngineOptions:
    """The engine's options among a command's, which are taken out; `RequestError` for adapters that cannot be."""
    values = {field: options.pop(field) for field in EngineOptions.model_fields}
    return EngineOptions(**{**values, "adapters": named_adapters(values["adapters"], options["name"])})


def _form(about: FieldInfo) -> dict[str, Any]:
    if about.annotation is bool:
        return {"is_flag": True}
    if about.annotation is int:
        low: Any = next((bound.ge for bound in about.metadata if isinstance(bound, Ge)), None)
        high: Any = next((bound.le for bound in about.metadata if isinstance(bound, Le)), None)
        return {"type": click.IntRange(low, high), "default": about.default, "show_default": True}
    if choices := get_args(about.annotation) if about.default != {} else ():
        return {"type": click.Choice(choices), "default": about.default, "show_default": True}
    return {"multiple": True, "metavar": "NAME=DIR"}


def _sentence(about: FieldInfo) -> str:
    text = about.description or ""
    return f"{text if text.startswith('auto') else text[0].upper() + text[1:]}."


def named_adapters(given: Sequence[str], name: str) -> dict[str, str]:
    """NAME=DIR of each --adapter; refuses what names none, or two models alike."""
    found: dict[str, str] = {}
    problems = []
    for option in given:
        adapter, equals, path = option.partition("=")
        if not (adapter and equals and path):
            problems.append(f"--adapter is '{option}'; expected NAME=DIR, such as poet=runs/poet/adapter.")
        elif adapter == name or adapter in found:
            other = "the model itself" if adapter == name else f"the adapter in {found[adapter]}"
            problems.append(f"--adapter {option}: '{adapter}' is the name of {other}; choose another.")
        else:
            found[adapter] = path
    if problems:
        raise RequestError(problems)
    return found
