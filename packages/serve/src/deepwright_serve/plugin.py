"""deepwright_serve as a plugin: the serve stage and the `deepwright serve` command."""

from __future__ import annotations

import click

from deepwright_core.hookspecs import hookimpl
from deepwright_core.registry import Registry

from . import stage


@hookimpl
def deepwright_register(registry: Registry) -> None:
    """Add the stage."""
    registry.add("stage", "serve", config=stage.ServeConfig)(stage.build)


@hookimpl
def deepwright_commands(cli: click.Group) -> None:
    """Add the command. Imported here: it needs torch and a web server, listing plugins does not."""
    from .command import serve_command

    cli.add_command(serve_command)
