"""`deepwright promote`: a version to its users, if it is good enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click

from deepwright_serve.check import Check

from .cli_plugins import block_option, load_plugins


def _check_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each field of the check; the flow's form has the same."""
    for name, field in reversed(Check.model_fields.items()):
        kind = field.annotation
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        assert kind is not None and kind is not NoneType
        command = click.option(
            f"--{name.replace('_', '-')}",
            type=click.Choice(choices) if choices else kind,
            default=field.default,
            show_default=True,
            help=field.description,
        )(command)
    return command


@click.command(
    short_help="Let a version go live, if it is good enough.",
    epilog="""\b
Examples:
  deepwright promote deepwright@candidate
  deepwright promote deepwright@candidate --server http://127.0.0.1:8000 --admin-key-file operator.key
  deepwright promote deepwright@previous --anyway --server http://127.0.0.1:8000 --admin-key-file operator.key
  deepwright promote runs/stages/rl-0123456789ab --server ... --admin-key-file ... --problems-file held_out.jsonl

The server is one that was started with --admin-key-file and --admin-models. OVERRIDES are Hydra's and say where runs
are and who remembers them: paths.root=/data/runs, tracking.uri=http://..., run.workflow=none (without Prefect).""",
)
@click.argument("source")
@click.argument("overrides", nargs=-1)
@click.option("--server", default="", help="Address of a running server to put it on.")
@click.option("--admin-key-file", default="", metavar="FILE", help="The key of that server's operator.")
@click.option("--name", default="deepwright", show_default=True, help="What requests call the model there.")
@click.option("--problems-file", default="", metavar="FILE", help="Problems to ask, one JSON object a line.")
@click.option("--prove-seconds", default=60.0, show_default=True, help="How long the version before may come back.")
@click.option("--failed-share", default=0.05, show_default=True, help="Share of failed answers that brings it back.")
@click.option("--anyway", is_flag=True, help="Also if it is worse than the live version, as long as it answers.")
@_check_options
@block_option
def promote(source: str, overrides: tuple[str, ...], block: tuple[str, ...], **options: Any) -> None:
    """Ask the version SOURCE held-out problems, compare it with the live one, and let it go live if it is good enough.

    With --server it is loaded beside the version that answers there, takes its name without dropping a request, and
    goes back if it fails in the first minute. Without, it is tried in a child process, and only the registry changes.
    A registered version then is `champion`, and the one before it `previous`.
    """
    from deepwright_core.registry import parse

    from . import environment, promotion, request, stopping
    from .rich_progress import display

    plugins = load_plugins(block)
    values = {name: options.pop(name) for name in Check.model_fields}
    check = parse(Check, values, "check", plugins.registry)
    for key in ("admin_key_file", "problems_file"):
        options[key] = str(Path(options[key]).expanduser().absolute()) if options[key] else ""
    asked = request.make(request.PIPELINE, overrides, plugins)
    environment.apply(asked.root)
    with stopping.terminated_as_exception():
        if asked.run.workflow == "none":
            wish = promotion.Wish(source=source, check=check, overrides=overrides, **options)
            promotion.settle(promotion.promote(wish, plugins, display()))
            return
        from . import prefect_server

        with prefect_server.reachable(asked.root):
            from . import cancellation, promote_flow

            try:
                promote_flow.promote(source=source, check=check, overrides=list(overrides), **options)
            finally:
                cancellation.confirm()
