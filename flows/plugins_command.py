"""`deepwright plugins`: every component, who provides it, and which plugins were left out and why."""

from __future__ import annotations

import json

import click

from .cli_plugins import block_option


@click.command(
    short_help="What is installed, from where, and what failed to load.",
    epilog="""\b
Examples:
  deepwright plugins
  deepwright plugins --kind attention
  deepwright plugins --json --block mla""",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, on standard output.")
@click.option("--kind", help="Only components of this kind.")
@block_option
def plugins(as_json: bool, kind: str | None, block: tuple[str, ...]) -> None:
    """List every component: its kind and name, the distribution that provides it, and what it is."""
    from deepwright_core.errors import RequestError, did_you_mean
    from deepwright_core.registry import KINDS

    from .cli_plugins import load_plugins

    if kind is not None and kind not in KINDS:
        raise RequestError(f"--kind {kind}: there is no such kind. {did_you_mean(kind, KINDS)}")
    loaded = load_plugins(block)
    components = [c for c in loaded.registry if kind is None or c.kind == kind]
    if as_json:
        listing = {
            "components": [
                {
                    "name": c.name,
                    "kind": c.kind,
                    "group": KINDS[c.kind].group,
                    "plugin": c.provider.plugin,
                    "distribution": c.provider.distribution,
                    "version": c.provider.version,
                    "doc": c.doc,
                }
                for c in components
            ],
            "plugins": [
                {"name": p.plugin, "distribution": p.distribution, "version": p.version} for p in loaded.providers
            ],
            "failures": [
                {
                    "name": f.provider.plugin,
                    "distribution": f.provider.distribution,
                    "version": f.provider.version,
                    "reason": f.reason,
                }
                for f in loaded.failures
            ],
            "blocked": loaded.blocked,
        }
        click.echo(json.dumps(listing, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("kind", "name", "provided by", "what it is"):
        table.add_column(column, no_wrap=column in ("kind", "name"))
    for c in components:
        table.add_row(*map(Text, (c.kind, c.name, f"{c.provider.distribution} {c.provider.version}", c.doc)))
    console.print(table)
    if loaded.blocked:
        console.print(f"Left out as asked: {', '.join(loaded.blocked)}.", highlight=False, markup=False)
    for failure in loaded.failures:
        console.print(f"Failed: {failure.provider}: {failure.reason}", highlight=False, markup=False)
