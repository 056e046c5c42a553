"""Plugins as commands see them: `--block NAME`, and a line on the terminal for each plugin that failed to load."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from deepwright_core.plugins import Plugins

block_option = click.option(
    "--block", multiple=True, metavar="NAME", help="Leave a plugin out (`deepwright plugins` names them). Repeatable."
)


def load_plugins(block: Sequence[str] = ()) -> Plugins:
    """The installed plugins, less the blocked ones; child processes inherit the block."""
    from deepwright_core.plugins import BLOCK_VARIABLE, blocked_from_environment, installed

    if block:
        names = dict.fromkeys([*blocked_from_environment(), *block])
        os.environ[BLOCK_VARIABLE] = ",".join(names)
        installed.cache_clear()
    plugins = installed()
    plugins.require_known(block)
    for failure in plugins.failures:
        click.echo(f"Plugin {failure.provider} could not be loaded and is left out: {failure.reason}", err=True)
    return plugins
