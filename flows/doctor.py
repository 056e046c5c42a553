"""`deepwright doctor`: is this machine, and this installation, able to run the pipeline?

It reads and imports; it changes nothing and opens no connection.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import click


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `state` is "ok", "note" (works, but know it) or "problem"."""

    what: str
    state: str
    detail: str


@click.command(
    short_help="Check this machine and this installation.",
    epilog="""\b
Examples:
  deepwright doctor
  deepwright doctor --json""",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, on standard output.")
@click.option("--root", default="runs", show_default=True, help="Where runs would write.")
def doctor(as_json: bool, root: str) -> int:
    """Check Python, packages, plugins, configuration, memory and disk. Exit status 1 when something is wrong."""
    findings = list(look(Path(root).expanduser().resolve()))
    if as_json:
        click.echo(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        for finding in findings:
            mark = {"ok": "✓", "note": "·", "problem": "✗"}[finding.state]
            click.echo(f"{mark} {finding.what}: {finding.detail}")
    return 1 if any(f.state == "problem" for f in findings) else 0


def look(root: Path) -> Iterator[Finding]:
    """Everything that is looked at."""
    import psutil

    python = ".".join(map(str, sys.version_info[:3]))
    fits = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Finding("Python", "ok" if fits else "note", python if fits else f"{python}; tried with 3.11 and 3.12")
    yield from _packages()
    yield from _plugins()
    memory = psutil.virtual_memory().total / 2**30
    yield Finding("memory", "ok" if memory >= 6 else "note", f"{memory:.1f} GiB (the pipeline needs up to 6)")
    yield Finding("processor", "ok", f"{psutil.cpu_count()} cores")
    place = root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / 2**30
    yield Finding("disk", "ok" if free >= 2 else "problem", f"{free:.1f} GiB free for {root}")
    yield from _torch()
    from . import service_addresses

    running = service_addresses.running(root)
    yield Finding("servers", "ok", f"{running.prefect} and {running.mlflow}" if running else "not up (`deepwright up`)")


def _packages() -> Iterator[Finding]:
    """Whether what is installed is what this version was made for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("deepwright") or []]
    except PackageNotFoundError:
        yield Finding("deepwright", "problem", "not installed as a distribution; `make setup` installs it")
        return
    wrong = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} is {found}, expected {requirement.specifier}")
    if wrong:
        yield Finding("packages", "problem", "; ".join(wrong))
    else:
        yield Finding("packages", "ok", f"deepwright {version('deepwright')} with what it needs")


def _plugins() -> Iterator[Finding]:
    from deepwright_core.errors import RequestError
    from deepwright_core.plugins import installed

    loaded = installed()
    for failure in loaded.failures:
        yield Finding(f"plugin {failure.provider.plugin}", "problem", failure.reason)
    names = ", ".join(p.plugin for p in loaded.providers)
    yield Finding("plugins", "ok" if loaded.providers else "problem", names or "none could be loaded")
    from . import compose, request

    try:
        request.make(request.PIPELINE, [], loaded)
        yield Finding("configuration", "ok", str(compose.conf_directory()))
    except RequestError as error:
        yield Finding("configuration", "problem", " ".join(error.problems))


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("torch", "problem", str(error))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    yield Finding("torch", "ok", f"{torch.__version__}, {device}, {torch.get_num_threads()} threads")
