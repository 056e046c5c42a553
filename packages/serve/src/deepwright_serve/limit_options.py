"""The bounds of a server as options of its command: one option a field of `Limits`, with its default and its words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
from pydantic import ValidationError

from deepwright_core.errors import RequestError

from .limits import Limits


def _name(field: str) -> str:
    """The option that sets a field: names of times, sizes and defaults say what they are; others are a most."""
    plain = field.endswith(("_seconds", "_bytes")) or field.startswith("default_")
    return field if plain else f"max_{field}"


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command one option for each bound."""
    for field, about in reversed(Limits.model_fields.items()):
        text = about.description or field
        command = click.option(
            f"--{_name(field).replace('_', '-')}",
            type=float if about.annotation is float else int,
            default=about.default,
            show_default=True,
            help=f"{text[0].upper()}{text[1:]}.",
        )(command)
    return command


def take_limits(options: dict[str, Any]) -> Limits:
    """The limits among a command's options, which are taken out; `RequestError` that names the wrong ones."""
    values = {field: options.pop(_name(field)) for field in Limits.model_fields}
    try:
        return Limits(**values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            option, expected = _name(str(item["loc"][0])).replace("_", "-"), item["msg"]
            problems.append(f"--{option} is {item['input']}; {expected[0].lower()}{expected[1:]}.")
        raise RequestError(problems) from None
