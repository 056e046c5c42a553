"""Hydra, once: a list of overrides in, plain data out.

Options come from conf/, from the folders that plugins name, and from the schemas of registered components. Nothing
outside this file and its neighbours `automatic_options` and `override_problems` knows Hydra or OmegaConf. Composition
is guarded by a lock, and an outer Hydra application is set aside and put back: Hydra keeps its state in the process.
`@hydra.main` is not used; it would add output folders and its own logging.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from deepwright_core.errors import RequestError
from deepwright_core.plugins import Plugins as InstalledPlugins

from . import automatic_options, override_problems

CONF_VARIABLE = "DEEPWRIGHT_CONF"
ROOT_VARIABLE = "DEEPWRIGHT_ROOT"

_lock = threading.RLock()
_composing_for: ContextVar[InstalledPlugins | None] = ContextVar("composing_for", default=None)


def conf_directory() -> Path:
    """Where conf/ is: named by DEEPWRIGHT_CONF, beside the flows of a checkout, or inside the installed wheel."""
    named = os.environ.get(CONF_VARIABLE)
    if named:
        if not (Path(named) / "config.yaml").is_file():
            raise RequestError(f"{CONF_VARIABLE} is {named!r}, but there is no config.yaml in that directory.")
        return Path(named).resolve()
    here = Path(__file__).resolve().parent
    for candidate in (here.parent / "conf", here / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise RequestError("The installation of deepwright lacks its conf directory; install it again.")


def plugin_folders(plugins: InstalledPlugins) -> list[tuple[str, str]]:
    """(plugin, search path) for every plugin that brings a folder of options."""
    folders = []
    for implementation in plugins.hook.deepwright_config_path.get_hookimpls():
        path = implementation.function()
        if path is None:
            continue
        if path.startswith("pkg://") and importlib.util.find_spec(path.removeprefix("pkg://")) is None:
            raise RequestError(
                f"Plugin {implementation.plugin_name} names {path} as its folder of options; there is no such package."
            )
        folders.append((implementation.plugin_name, path))
    return folders


class PluginSearchPath(SearchPathPlugin):
    """Adds the plugins' folders to Hydra's search path, after conf/: a plugin never shadows a built-in option."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        plugins = _composing_for.get()
        if plugins is not None:
            for plugin, path in plugin_folders(plugins):
                search_path.append(provider=plugin, path=path)


Plugins.instance().register(PluginSearchPath)


@contextmanager
def _hydra(plugins: InstalledPlugins) -> Iterator[GlobalHydra]:
    """A Hydra of our own with every option known; the outer one, and its stored options, come back at the end."""
    store = ConfigStore.instance()
    with _lock:
        outer, repo = GlobalHydra.instance().hydra, store.repo
        GlobalHydra.instance().clear()
        store.repo = copy.deepcopy(repo)
        token = _composing_for.set(plugins)
        try:
            with initialize_config_dir(str(conf_directory()), version_base="1.3", job_name="deepwright"):
                loader = GlobalHydra.instance().config_loader()

                def has_yaml(group: str, name: str) -> bool:
                    return name in loader.get_group_options(group, ObjectType.CONFIG)

                automatic_options.store(plugins.registry, has_yaml, _chosen_groups())
                with _environment_hidden():
                    yield GlobalHydra.instance()
        finally:
            _composing_for.reset(token)
            store.repo = repo
            GlobalHydra.instance().clear()
            GlobalHydra.instance().hydra = outer


def _chosen_groups() -> set[str]:
    """The groups in the defaults list of conf/config.yaml."""
    config = OmegaConf.to_container(OmegaConf.load(conf_directory() / "config.yaml"), resolve=False)
    listed = config.get("defaults", []) if isinstance(config, dict) else []
    return {str(key).split("@")[0] for entry in listed if isinstance(entry, dict) for key in entry}


@contextmanager
def _environment_hidden() -> Iterator[None]:
    """Within this, `${oc.env:NAME}` is refused however it is spelt: the resolved config is logged, secrets are not."""

    def refuse(*_: Any) -> str:
        raise RequestError(override_problems.ENVIRONMENT)

    from omegaconf.resolvers import oc

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def compose(overrides: Sequence[str], plugins: InstalledPlugins) -> dict[str, Any]:
    """The composed config as plain data.

    Raises `RequestError` with one sentence for each override that cannot be applied: a bad one is noted and left
    out, so that the ones after it are looked at too.
    """
    problems = override_problems.refused(overrides)
    remaining = [o for o in overrides if not override_problems.refused([o])]
    with _hydra(plugins) as hydra:
        while True:
            try:
                composed = _compose(remaining)
                break
            except RequestError as error:
                raise RequestError([*problems, *error.problems]) from None
            except (HydraException, OmegaConfBaseException) as error:
                culprit, sentence = override_problems.explain(error, remaining, lambda: _base_keys(hydra))
                if sentence not in problems:
                    problems.append(sentence)
                if culprit is None:
                    raise RequestError(problems) from error
                remaining.remove(culprit)
    if problems:
        raise ComposedWithProblems(problems, composed)
    return composed


class ComposedWithProblems(RequestError):
    """Some overrides were wrong; `composed` is the config without them, so that its own problems can be shown too."""

    def __init__(self, problems: Sequence[str], composed: dict[str, Any]) -> None:
        super().__init__(problems)
        self.composed = composed


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    root = os.environ.get(ROOT_VARIABLE)
    first = [f"paths.root='{root}'"] if root else []
    config = hydra_compose(automatic_options.ROOT_CONFIG, overrides=[*first, *overrides])
    # A missing value ("???") stays as it is: validation names it among all other problems.
    try:
        data = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, RequestError):
            raise error.__cause__ from None
        raise
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}


def _base_keys(hydra: GlobalHydra) -> list[str]:
    """Every dotted key and every group of the config without overrides, to find near matches."""
    keys: list[str] = []

    def walk(value: Any, path: str) -> None:
        if path:
            keys.append(path)
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{path}.{key}" if path else str(key))

    walk(_compose([]), "")
    return keys


def group_options(group: str, plugins: InstalledPlugins) -> list[str]:
    """The options of a config group, as `deepwright run` would accept them."""
    with _hydra(plugins) as hydra:
        return sorted(hydra.config_loader().get_group_options(group, ObjectType.CONFIG))


def sweep(overrides: Sequence[str], plugins: InstalledPlugins) -> list[list[str]]:
    """The jobs of a multirun: every combination of `a=1,2`, `a=choice(...)`, `a=range(...)`, `group=glob(*)`."""
    problems = override_problems.refused(overrides)
    if problems:
        raise RequestError(problems)
    with _hydra(plugins) as hydra:
        try:
            parsed = OverridesParser.create(config_loader=hydra.config_loader()).parse_overrides(list(overrides))
            return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]
        except HydraException as error:
            raise RequestError(override_problems.one_line(error)) from None


def load_resolved(path: Path) -> dict[str, Any]:
    """A resolved config as a run saved it (OmegaConf reads `1e-3` as a number; plain YAML loaders do not)."""
    if not path.is_file():
        raise RequestError(f"--config {path}: there is no such file.")
    try:
        with _lock, _environment_hidden():
            data = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"--config {path} cannot be read: {override_problems.one_line(error)}") from None
    if not isinstance(data, dict):
        raise RequestError(f"--config {path} is a {type(data).__name__}; expected the mapping that a run has saved.")
    return {str(key): value for key, value in data.items()}


def to_yaml(composed: dict[str, Any]) -> str:
    """The composed config as YAML that `load_resolved` reads back to the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(composed))
