"""`deepwright serve`: the server's own command, with every way of naming a model that the other commands know.

The server's package knows directories; run ids and registered names are the tracker's, which only this side knows.
"""

from __future__ import annotations

from typing import Any

import click

from deepwright_core.errors import RequestError
from deepwright_serve.command import serve_command

from .cli_plugins import block_option, load_plugins

TRACE_SHARE = 0.01

EXAMPLES = """\b
Examples:
  deepwright serve runs/stages/rl-0123456789ab
  deepwright serve deepwright@champion --port 8080
  deepwright serve models:/deepwright/3 --host 0.0.0.0 --api-key-file keys
  deepwright serve deepwright@champion --admin-key-file operator.key --admin-models runs

The last one can be given other versions while it runs: `deepwright promote --help`."""


def _serve(
    source: str, block: tuple[str, ...], trace_to: str | None, trace_share: float | None, **options: Any
) -> None:
    """Serve the model SOURCE to OpenAI clients and browsers.

    SOURCE is a model directory, a stage's directory, a run id of the tracker or a registered name.
    """
    from . import model_source

    if trace_share is not None and trace_to is None:
        raise RequestError(f"--trace-share is {trace_share:g}, and there is no --trace-to; give both, or none.")
    plugins = load_plugins(block)
    found = model_source.find(source, plugins)
    if trace_to is not None:
        from .request_traces import RequestTraces

        plugins.manager.register(
            RequestTraces(trace_to, TRACE_SHARE if trace_share is None else trace_share), name="request-traces"
        )
    assert serve_command.callback is not None
    serve_command.callback(model=found.directory, version=found.version, **options)


serve = click.Command(
    "serve",
    callback=_serve,
    params=[
        click.Argument(["source"]),
        *(each for each in serve_command.params if each.name != "model"),
        click.Option(
            ["--trace-to"],
            metavar="URI",
            help="Write requests, with their text, as traces to MLflow at this address or database.",
        ),
        click.Option(
            ["--trace-share"],
            type=float,
            help=f"Share of the requests that is traced (1: all).  [default: {TRACE_SHARE}]",
        ),
    ],
    help=_serve.__doc__,
    short_help="Serve a model over HTTP, with a chat page.",
    epilog=EXAMPLES,
)
block_option(serve)
