"""Plugins: found in a fixed order, refused when they collide, survived when they are broken, told what happens."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, distributions
from pathlib import Path

import pytest

from deepwright_core.errors import RequestError
from deepwright_core.events import (
    CheckpointEvent,
    EvaluationEvent,
    RequestEvent,
    RolloutEvent,
    RunEvent,
    StageEvent,
    StepEvent,
)
from deepwright_core.hookspecs import hookspec
from deepwright_core.plugins import blocked_from_environment, discover, load
from deepwright_core.registry import ComponentConfig, Provider, Registry

ATTENTION = """
from deepwright_core.hookspecs import hookimpl
from deepwright_core.registry import ComponentConfig

class Config(ComponentConfig):
    name: str = "{component}"
    width: int = 4

@hookimpl
def deepwright_register(registry):
    @registry.add("attention", "{component}", config=Config)
    def build(config, model, layer):
        '''Attention for a test.'''
        return ("built", config.width, layer)
"""

Install = Callable[..., EntryPoint]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one module and one entry point on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = []

    def put(distribution: str, plugin: str, source: str, version: str = "1.0") -> EntryPoint:
        module = distribution.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[deepwright]\n{plugin} = {module}\n")
        (found,) = [d for d in distributions(path=[str(tmp_path)]) if d.name == distribution]
        (entry,) = found.entry_points
        return entry

    yield put
    for module in modules:
        sys.modules.pop(module, None)


def test_our_plugins_come_first_and_strangers_in_the_order_of_their_names(install: Install) -> None:
    install("zebra", "aardvark", ATTENTION.format(component="zebra"))
    install("aardwolf", "zzz", ATTENTION.format(component="aardwolf"))
    names = [entry.name for entry in discover()]
    ours = [name for name in names if name in {"core", "mla", "moe", "rl", "serve"}]
    assert ours == ["core", "mla", "moe", "rl", "serve"]
    assert names[: len(ours)] == ours
    assert names.index("aardvark") < names.index("zzz")


def test_a_component_knows_who_provided_it_and_is_built_from_its_checked_config(install: Install) -> None:
    plugins = load([install("third-party", "third", ATTENTION.format(component="thirds"), "2.5")])
    component = plugins.registry.get("attention", "thirds")
    assert component.provider == Provider("third", "third-party", "2.5")
    assert component.doc == "Attention for a test."
    assert plugins.registry.build("attention", {"name": "thirds", "width": 7}, None, 3) == ("built", 7, 3)
    with pytest.raises(RequestError, match=r"attention\.widht is not an option of Config\. Did you mean width\?"):
        plugins.registry.parse("attention", {"name": "thirds", "widht": 7})


def test_two_plugins_with_one_component_name_are_both_named(install: Install) -> None:
    first = install("alpha-dist", "alpha", ATTENTION.format(component="same"))
    second = install("beta-dist", "beta", ATTENTION.format(component="same"))
    plugins = load([first, second])
    assert plugins.registry.get("attention", "same").provider.plugin == "alpha"
    (failure,) = plugins.failures
    assert failure.provider.plugin == "beta"
    assert "Two plugins provide attention 'same'" in failure.reason
    assert "alpha-dist 1.0" in failure.reason and "beta-dist 1.0" in failure.reason
    assert "--block beta" in failure.reason


def test_two_distributions_with_one_plugin_name_are_both_named(install: Install) -> None:
    first = install("alpha-dist", "twin", ATTENTION.format(component="one"))
    second = install("beta-dist", "twin", ATTENTION.format(component="two"))
    plugins = load([first, second])
    assert plugins.registry.names("attention") == ["one"]
    (failure,) = plugins.failures
    assert "alpha-dist 1.0" in failure.reason and "beta-dist 1.0" in failure.reason


def test_unknown_names_are_answered_with_near_ones() -> None:
    registry = load(discover()).registry
    with pytest.raises(RequestError, match=r"There is no attention called 'gqqa'\. Did you mean gqa\?"):
        registry.get("attention", "gqqa")
    with pytest.raises(RequestError, match=r"model\.attention\.name: There is no attention called 'mlaa'"):
        registry.parse("attention", {"name": "mlaa"}, "model.attention")
    with pytest.raises(RequestError, match=r"kind 'atention'\. Did you mean attention?"):
        registry.add("atention", "x", config=ComponentConfig)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("def broken(:", "SyntaxError"),
        (
            "from deepwright_core.hookspecs import hookimpl\n@hookimpl\ndef deepwright_regster(registry): pass",
            "deepwright_regster",
        ),
        (
            "from deepwright_core.hookspecs import hookimpl\n@hookimpl\ndef deepwright_step_end(event, step): pass",
            "step",
        ),
        (ATTENTION.format(component="half") + "    raise KeyError('too late')", "KeyError: 'too late'"),
    ],
    ids=["missing import", "raises", "syntax", "misspelt hook", "unknown argument", "registers half"],
)
def test_a_broken_plugin_is_shown_and_the_rest_works(install: Install, source: str, reason: str) -> None:
    broken = install("broken-dist", "broken", source)
    works = install("works-dist", "works", ATTENTION.format(component="works"))
    plugins = load([broken, works])
    assert plugins.registry.names("attention") == ["works"]
    assert [provider.plugin for provider in plugins.providers] == ["works"]
    (failure,) = plugins.failures
    assert failure.provider == Provider("broken", "broken-dist", "1.0")
    assert reason in failure.reason
    assert not plugins.manager.has_plugin("broken")
    plugins.hook.deepwright_step_end(event=StepEvent("pretrain", 1, 2, {}))


def test_a_blocked_plugin_is_not_even_imported(install: Install) -> None:
    entry = install("blocked-dist", "blocked", "raise SystemExit('imported')")
    plugins = load([entry], block=["blocked"])
    assert plugins.blocked == ["blocked"]
    assert not plugins.failures and not plugins.providers
    plugins.require_known(["blocked"])


def test_blocking_what_does_not_exist_is_refused(install: Install) -> None:
    plugins = load([install("works-dist", "works", ATTENTION.format(component="works"))])
    with pytest.raises(RequestError, match=r"--block wrks: there is no plugin 'wrks'\. Did you mean works\?"):
        plugins.require_known(["wrks"])


def test_child_processes_inherit_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPWRIGHT_BLOCK", " mla, ,rl ")
    assert blocked_from_environment() == ["mla", "rl"]
    assert {"mla", "rl"} == set(load(discover(), blocked_from_environment()).blocked)


EVENTS = {
    "run_start": RunEvent("pipeline", {}, Path("runs")),
    "run_end": RunEvent("pipeline", {}, Path("runs"), "done"),
    "stage_start": StageEvent("rl", "1f", Path("runs/rl")),
    "stage_end": StageEvent("rl", "1f", Path("runs/rl"), "done", {"reward": 1.0}),
    "step_end": StepEvent("rl", 3, 10, {"loss": 0.5}),
    "checkpoint_saved": CheckpointEvent("rl", 3, Path("runs/rl/checkpoints/3")),
    "rollout_done": RolloutEvent("rl", 3, [{"reward": 1.0}]),
    "request_done": RequestEvent(
        "req_1", "/v1/completions", "deepwright", "", 200, "", 0.0, 1.5, 0.0, 0.5, 4, 0, 8, 0, ("stop",)
    ),
    "evaluation_done": EvaluationEvent("rl", 3, "validation", {"accuracy": 0.5}),
}


def test_every_event_reaches_every_plugin(install: Install) -> None:
    listener = "from deepwright_core.hookspecs import hookimpl\nseen = []\n" + "".join(
        f"\n@hookimpl\ndef deepwright_{name}(event):\n    seen.append(('{name}', event))\n" for name in EVENTS
    )
    plugins = load([install("ear-one", "one", listener), install("ear-two", "two", listener)])
    assert not plugins.failures
    for name, event in EVENTS.items():
        getattr(plugins.hook, f"deepwright_{name}")(event=event)
    import ear_one  # type: ignore[import-not-found]
    import ear_two  # type: ignore[import-not-found]

    assert ear_one.seen == ear_two.seen == list(EVENTS.items())


def test_these_are_all_the_events_there_are() -> None:
    from deepwright_core import hookspecs

    components = {"register", "config_path", "commands"}
    declared = {name.removeprefix("deepwright_") for name in vars(hookspecs) if name.startswith("deepwright_")}
    assert declared == components | set(EVENTS)
    assert hookspec.project_name == "deepwright"


def test_an_added_component_never_replaces_a_built_in_one() -> None:
    registry = Registry()
    registry.provider = Provider("core", "deepwright-core", "0.1.0")
    registry.add("attention", "gqa", config=ComponentConfig)(lambda config: "built in")
    registry.provider = Provider("stranger", "stranger", "1.0")
    with pytest.raises(RequestError, match=r"deepwright-core 0\.1\.0 .* and stranger 1\.0"):
        registry.add("attention", "gqa", config=ComponentConfig)
    assert registry.get("attention", "gqa").build(None) == "built in"


def test_the_command_lists_plugins_failures_and_blocks(install: Install, tmp_path: Path) -> None:
    install("works-dist", "works", ATTENTION.format(component="works"), "3.1")
    install("broken-dist", "broken", "raise RuntimeError('no licence')")
    install("unwanted-dist", "unwanted", "raise SystemExit('imported')")
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "plugins", "--json", "--block", "unwanted"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "broken-dist 1.0 (plugin broken) could not be loaded and is left out: RuntimeError: no licence" in done.stderr
    )
    listed = json.loads(done.stdout)
    (component,) = [c for c in listed["components"] if c["name"] == "works"]
    assert (component["kind"], component["plugin"]) == ("attention", "works")
    assert (component["distribution"], component["version"]) == ("works-dist", "3.1")
    assert component["doc"] == "Attention for a test."
    assert [failure["name"] for failure in listed["failures"]] == ["broken"]
    assert listed["blocked"] == ["unwanted"]
    assert {"gqa", "mla"} <= {c["name"] for c in listed["components"] if c["kind"] == "attention"}
