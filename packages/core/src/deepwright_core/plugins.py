"""The plugin manager: finds plugins, survives broken ones, and remembers who provided what.

Discovery order is fixed (deepwright's own plugins first, then by name), because the order in which an environment
lists its entry points is not. A plugin that fails to import or to register is recorded in `failures` and shown by
`deepwright plugins`; everything else keeps working. `DEEPWRIGHT_BLOCK=name,name` (or `--block`) leaves plugins out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .errors import RequestError, did_you_mean
from .registry import Provider, Registry

BLOCK_VARIABLE = "DEEPWRIGHT_BLOCK"


@dataclass(frozen=True)
class Failure:
    """A plugin that could not be used, and why."""

    provider: Provider
    reason: str


@dataclass
class Plugins:
    """What is loaded: hooks to call, components to build, and what went wrong."""

    manager: pluggy.PluginManager
    registry: Registry
    providers: list[Provider] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)

    @property
    def hook(self) -> Any:
        """Call a hook on every plugin: `plugins.hook.deepwright_step_end(event=...)`."""
        return self.manager.hook

    def require_known(self, names: Iterable[str]) -> None:
        """Refuse to block what does not exist: a misspelt `--block` must not pass for a block."""
        known = {p.plugin for p in self.providers} | {f.provider.plugin for f in self.failures} | set(self.blocked)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise RequestError([f"--block {n}: there is no plugin '{n}'. {did_you_mean(n, known)}" for n in unknown])


def _provider(entry: EntryPoint) -> Provider:
    if entry.dist is None:
        return Provider(entry.name)
    return Provider(entry.name, entry.dist.name, entry.dist.version)


def _order(entry: EntryPoint) -> tuple[bool, bool, str]:
    ours = _provider(entry).distribution.startswith("deepwright-")
    return (entry.name != "core", not ours, entry.name)


def discover() -> list[EntryPoint]:
    """Entry points of the group `deepwright`, in loading order, each once."""
    found = {(e.name, e.value): e for e in entry_points(group=hookspecs.PROJECT)}
    return sorted(found.values(), key=_order)


def load(entries: Iterable[EntryPoint], block: Iterable[str] = ()) -> Plugins:
    """Load plugins from entry points. Never raises for a broken plugin: see `Plugins.failures`."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    plugins = Plugins(manager, Registry())
    block = set(block)
    for entry in entries:
        provider = _provider(entry)
        if entry.name in block:
            plugins.blocked.append(entry.name)
            continue
        try:
            if manager.has_plugin(entry.name):
                first = next(str(p) for p in plugins.providers if p.plugin == entry.name)
                raise RequestError(
                    f"Two distributions provide a plugin called '{entry.name}': {first} and {provider}. "
                    "The second was left out; uninstall one."
                )
            plugin = entry.load()
            manager.register(plugin, name=entry.name)
            manager.check_pending()
            plugins.registry.provider = provider
            # Only this plugin's own implementation: one that fails must not take the others with it.
            register = getattr(plugin, "deepwright_register", None)
            if register is not None:
                register(registry=plugins.registry)
        except Exception as error:
            if manager.get_plugin(entry.name) is not None and entry.name not in {p.plugin for p in plugins.providers}:
                manager.unregister(name=entry.name)
            plugins.registry.forget(provider)
            plugins.failures.append(Failure(provider, f"{type(error).__name__}: {error}"))
            continue
        plugins.providers.append(provider)
    return plugins


def blocked_from_environment() -> list[str]:
    """Names in `DEEPWRIGHT_BLOCK`, which child processes inherit."""
    return [name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",") if name.strip()]


@cache
def installed() -> Plugins:
    """The plugins installed in this environment, less the blocked ones. Loaded once a process."""
    return load(discover(), blocked_from_environment())
