"""`deepwright model`: which models there are, and one model's parameters, cache, arithmetic and memory, computed from
its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_plugins import block_option

if TYPE_CHECKING:
    from deepwright_core.model.config import ModelConfig
    from deepwright_core.plugins import Plugins

GROUP = "model"


@click.group(short_help="What a model is made of and what it costs.")
def model() -> None:
    """Look at models without training them."""


@model.command(name="list", short_help="The models that have a name.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, on standard output.")
@block_option
def list_models(as_json: bool, block: tuple[str, ...]) -> None:
    """List the options of the config group `model`: what `deepwright model show` and `model=NAME` accept."""
    from . import compose
    from .cli_plugins import load_plugins
    from .option_text import first_sentence

    plugins = load_plugins(block)
    models = {name: first_sentence(GROUP, name, plugins) for name in compose.group_options(GROUP, plugins)}
    if as_json:
        click.echo(json.dumps([{"name": name, "about": about} for name, about in models.items()], indent=1))
        return
    width = max(map(len, models), default=0)
    for name, about in models.items():
        click.echo(f"{name:<{width}}  {about}".rstrip())


@model.command(
    short_help="A model's parameters, cache, arithmetic and memory.",
    epilog="""\b
Examples:
  deepwright model show v3
  deepwright model show v3 --context 131072
  deepwright model show tiny model/attention=gqa --json
  deepwright model show runs/stages/rl-<identity>/model""",
)
@click.argument("name", required=False)
@click.argument("overrides", nargs=-1)
@click.option("--context", type=int, help="Tokens in sight, for arithmetic and memory.  [default: 4096]")
@click.option("--json", "as_json", is_flag=True, help="As JSON, on standard output.")
@block_option
def show(
    name: str | None, overrides: tuple[str, ...], context: int | None, as_json: bool, block: tuple[str, ...]
) -> None:
    """Show the model NAME (`deepwright model list` tells which there are) with OVERRIDES applied, or the model of a
    directory. Nothing is allocated: the largest takes seconds."""
    from deepwright_core.errors import RequestError
    from deepwright_core.model.description import describe

    from . import compose, model_report
    from .cli_plugins import load_plugins
    from .option_text import first_sentence

    plugins = load_plugins(block)
    options = compose.group_options(GROUP, plugins)
    if not name:
        raise RequestError(f"Which model? Name one of: {', '.join(options)}.")
    if name not in options and Path(name).expanduser().exists():
        config, about = _of_directory(Path(name).expanduser(), overrides, plugins), ""
    else:
        config, about = _of_option(name, overrides, plugins), first_sentence(GROUP, name, plugins)
    facts: dict[str, Any] = describe(plugins.registry, config, context)
    if as_json:
        click.echo(json.dumps({"model": name, **facts}, indent=1))
        return
    model_report.show(name, about, facts)


def _of_option(name: str, overrides: tuple[str, ...], plugins: Plugins) -> ModelConfig:
    from . import request

    # Composed for the whole pipeline: the vocabulary's size and the precision count too.
    sections = request.make(request.PIPELINE, [f"{GROUP}={name}", *overrides], plugins).sections
    config: ModelConfig = sections[GROUP]
    if config.vocab_size:
        return config
    # "as many as the tokenizer has"
    return config.model_copy(update={"vocab_size": getattr(sections["tokenizer"], "vocab_size", 1)})


def _of_directory(path: Path, overrides: tuple[str, ...], plugins: Plugins) -> ModelConfig:
    from deepwright_core.errors import RequestError
    from deepwright_core.model.directory import find_model, read_config

    if overrides:
        raise RequestError(
            f"{path} is a directory, and its config.json says what its model is; leave out {' '.join(overrides)}."
        )
    return read_config(find_model(path), plugins.registry)
