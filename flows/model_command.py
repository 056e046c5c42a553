"""`deepwright model show`: a model's parameters, cache and arithmetic, computed from its configuration."""

from __future__ import annotations

import json
from typing import Any

import click

from .cli_plugins import block_option


@click.group(short_help="What a model is made of and what it costs.")
def model() -> None:
    """Look at models without training them."""


@model.command(
    epilog="""\b
Examples:
  deepwright model show tiny
  deepwright model show tiny model/attention=gqa --json"""
)
@click.argument("name")
@click.argument("overrides", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="As JSON, on standard output.")
@block_option
def show(name: str, overrides: tuple[str, ...], as_json: bool, block: tuple[str, ...]) -> None:
    """Show the model option NAME (an option of the config group `model`), with OVERRIDES applied."""
    from deepwright_core.model.cost import describe

    from . import request
    from .cli_plugins import load_plugins

    plugins = load_plugins(block)
    # Composed for the whole pipeline: the vocabulary's size and the precision count too.
    checked = request.make(request.PIPELINE, [f"model={name}", *overrides], plugins)
    config = checked.sections["model"]
    if not config.vocab_size:  # "as many as the tokenizer has"
        config = config.model_copy(update={"vocab_size": getattr(checked.sections["tokenizer"], "vocab_size", 1)})
    facts: dict[str, Any] = describe(plugins.registry, config)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        click.echo(f"{key:<{width}}  {shown}")
