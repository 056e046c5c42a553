"""The `deepwright` command.

Only click is imported here; each command imports what it needs when it is called, so that `--help` is immediate.
Exit status: 0 done, 1 the work failed, 2 the request was wrong, 130 interrupted.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import click

from . import threads

COMMANDS: dict[str, tuple[str, str]] = {
    # name: (module:attribute, one line for --help)
    "run": ("flows.run_command:run", "Run the pipeline or a stage of it."),
    "serve": ("flows.serve_command:serve", "Serve a model over HTTP, with a chat page."),
    "promote": ("flows.promote_command:promote", "Let a version go live, if it is good enough."),
    "convert": ("flows.convert_command:convert", "Models in from other programs, and out to them."),
    "model": ("flows.model_command:model", "What a model is made of and what it costs."),
    "plugins": ("flows.plugins_command:plugins", "What is installed, from where, and what failed to load."),
    "kernels": ("flows.kernels_command:kernels", "The operators' backends, what runs here, and a test of them."),
    "up": ("flows.up:up", "Start the workflow's and the tracker's pages, with every flow ready to run."),
    "deploy": ("flows.deploy:deploy", "Put the flows on the workflow's pages again, after installing a plugin."),
    "doctor": ("flows.doctor:doctor", "Check this machine and this installation."),
}

EXAMPLES = """\b
Examples:
  deepwright run pipeline                         text to a served reasoning model
  deepwright run pipeline experiment=smoke        the same in two minutes, to see that it works
  deepwright run pretrain model/attention=gqa     one stage (and what it needs), another attention
  deepwright run rl rl.lr=1e-4                    only what changed, and what depends on it, runs again
  deepwright run pretrain -m optimizer=adamw,muon one run for each
  deepwright run pretrain --cfg                   show the configuration and stop
  deepwright serve deepwright@champion            the server and its chat page
  deepwright promote deepwright@candidate         the latest model in its place, if it is as good
  deepwright plugins                              what can be chosen, and who provides it
  deepwright up                                   the pages in the browser
"""


class Commands(click.Group):
    """Built-in commands by name, and those of third-party plugins, each imported only when it is needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*COMMANDS, *sorted(self._from_plugins())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, attribute = COMMANDS[cmd_name][0].split(":")
            command: click.Command = getattr(importlib.import_module(module), attribute)
            return command
        return self._from_plugins().get(cmd_name) or self._from_plugins(ours=True).get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=2)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            ctx.fail(f"No such command '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)

    def _from_plugins(self, ours: bool = False) -> dict[str, click.Command]:
        """Commands that plugins add. deepwright's own plugins are asked only for a name that is not built in."""
        from deepwright_core.plugins import blocked_from_environment, discover, load

        entries = discover()
        if not ours:
            entries = [e for e in entries if e.dist is None or not e.dist.name.startswith("deepwright-")]
        if not entries:
            return {}
        group = click.Group()
        loaded = load(entries, blocked_from_environment())
        for implementation in loaded.hook.deepwright_commands.get_hookimpls():
            try:
                implementation.function(cli=group)
            except Exception as error:
                click.echo(f"Plugin {implementation.plugin_name} could not add its commands: {error}", err=True)
        return {name: command for name, command in group.commands.items() if name not in COMMANDS}

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, line) for name, (_, line) in COMMANDS.items()]
        rows += [(name, command.get_short_help_str(80)) for name, command in sorted(self._from_plugins().items())]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(
    cls=Commands,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    no_args_is_help=True,
)
@click.version_option(package_name="deepwright")
def cli() -> None:
    """An open laboratory for DeepSeek-style language models: from text to a served reasoning model.

    `deepwright COMMAND --help` explains each command.
    """


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns errors into sentences and exit statuses."""
    sys.exit(call(arguments))


def call(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit status."""
    from deepwright_core.errors import RequestError, WorkError

    threads.wait_with_short_spins()
    try:
        result: Any = cli.main(args=arguments, prog_name="deepwright", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except RequestError as error:
        for problem in error.problems:
            click.echo(f"deepwright: {problem}", err=True)
        return 2
    except WorkError as error:
        click.echo(f"deepwright: {error}", err=True)
        return 1
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code if error.exit_code != 1 else 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("deepwright: stopped. The same command goes on from the last checkpoint.", err=True)
        return 130
    except Exception as error:
        click.echo(f"deepwright: {type(error).__name__}: {error} ({_keep_traceback()})", err=True)
        return 1
    except BaseException as error:
        if type(error).__name__ not in {"Terminated", "TerminationSignal"}:  # ours, and Prefect's
            raise
        click.echo("deepwright: stopped from outside. The same command goes on from the last checkpoint.", err=True)
        return 143


def _keep_traceback() -> str:
    """Save the traceback at hand below the runs' directory, and say where."""
    import os

    folder = Path(os.environ.get("DEEPWRIGHT_ROOT", "runs")) / "logs"
    path = folder / f"crash-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc())
    except OSError as error:
        return f"the details could not be saved: {error.strerror}"
    return f"details in {path}"


if __name__ == "__main__":
    main()
