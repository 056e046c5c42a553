"""Overrides to plain data: what composes, what is refused, and that every problem is told at once."""

import threading
from pathlib import Path
from typing import Annotated, Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from pydantic import BaseModel, ConfigDict, Field

from deepwright_core.errors import RequestError
from deepwright_core.plugins import Plugins, load
from deepwright_core.registry import ComponentConfig, ComponentOf
from flows import compose, request


def problems_of(plugins: Plugins, *overrides: str, target: str = "learn") -> list[str]:
    with pytest.raises(RequestError) as error:
        request.make(target, overrides, plugins)
    return error.value.problems


def test_a_config_is_plain_data_with_every_stage_complete(plugins: Plugins) -> None:
    composed = compose.compose(["learn.steps=7", "experiment=slow"], plugins)
    assert composed["learn"] == {"steps": 7, "every": 5, "pause": 0.05, "fail": "", "rate": 0.1}
    assert composed["gather"] == {"numbers": 20}
    assert type(composed["learn"]) is dict and type(composed["run"]["stages"]) is list


def test_a_component_without_a_yaml_is_an_option(plugins: Plugins) -> None:
    composed = compose.compose(["optimizer=leap", "optimizer.length=3"], plugins)
    assert composed["optimizer"] == {"name": "leap", "length": 3}
    assert compose.group_options("optimizer", plugins) == ["leap", "walk"]


def test_a_yaml_wins_over_the_automatic_option(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    conf = tmp_path / "conf"
    shutil.copytree(compose.conf_directory(), conf)
    (conf / "optimizer").mkdir()
    (conf / "optimizer" / "walk.yaml").write_text("name: walk\npace: 9.0\n")
    monkeypatch.setenv("DEEPWRIGHT_CONF", str(conf))
    assert compose.compose([], plugins)["optimizer"] == {"name": "walk", "pace": 9.0}


def test_options_of_other_plugins_do_not_stay_behind(plugins: Plugins) -> None:
    compose.compose([], plugins)
    assert compose.group_options("optimizer", load([])) == []


def test_a_value_without_default_is_asked_for(plugins: Plugins) -> None:
    assert problems_of(plugins, "optimizer=leap") == ["optimizer.length is missing; give it a value."]


def test_an_unknown_key_is_named_with_its_nearest(plugins: Plugins) -> None:
    (problem,) = problems_of(plugins, "learn.stepz=3")
    assert "learn.stepz is not in the config" in problem and "learn.steps" in problem


def test_an_unknown_option_is_named_with_what_there_is(plugins: Plugins) -> None:
    (problem,) = problems_of(plugins, "optimizer=wlk")
    assert problem == "optimizer=wlk: there is no such option. Did you mean walk? Known: leap, walk."


def test_of_two_choices_for_one_group_the_wrong_one_is_named(plugins: Plugins) -> None:
    (problem,) = problems_of(plugins, "optimizer=walk", "optimizer=wlk")
    assert problem.startswith("optimizer=wlk")


def test_a_wrong_type_is_a_sentence(plugins: Plugins) -> None:
    (problem,) = problems_of(plugins, "learn.rate=fast")
    assert problem.startswith("learn.rate is 'fast'; input should be a valid number")


def test_all_problems_are_told_at_once(plugins: Plugins) -> None:
    problems = problems_of(
        plugins, "learn.stepz=3", "optimizer=wlk", "learn.rate=fast", "run.cpu_watts=-1", "nothing=1", target="lern"
    )
    for sign in ("'lern'", "learn.stepz", "optimizer=wlk", "learn.rate", "run.cpu_watts", "nothing"):
        assert any(sign in problem for problem in problems), (sign, problems)
    assert len(problems) == 6


def test_an_added_key_is_refused_by_the_schema(plugins: Plugins) -> None:
    (problem,) = problems_of(plugins, "+learn.stepz=3")
    assert problem.startswith("learn.stepz is not an option of LearnConfig. Did you mean steps?")


@pytest.mark.parametrize(
    "override", ["hydra.searchpath=[file:///tmp]", "hydra/launcher=basic", "+hydra.run.dir=x", "++hydra.verbose=true"]
)
def test_hydra_itself_cannot_be_changed(plugins: Plugins, override: str) -> None:
    (problem,) = problems_of(plugins, override)
    assert override in problem and "refused" in problem


@pytest.mark.parametrize("spelling", ["${oc.env:SECRET}", "${ oc.env:SECRET}", "${oc.${learn.fail}:SECRET}"])
def test_the_environment_cannot_be_read(plugins: Plugins, spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "swordfish")
    overrides = [f"paths.root='{spelling}'"]
    if "learn" in spelling:  # the resolver's name put together: caught when it is resolved
        overrides.append("learn.fail=env")
    problems = problems_of(plugins, *overrides)
    assert any("refused" in problem for problem in problems)
    assert not any("swordfish" in problem for problem in problems)


def test_the_environment_resolver_is_whole_again_afterwards(plugins: Plugins, monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf

    compose.compose([], plugins)
    monkeypatch.setenv("DEEPWRIGHT_TEST_VALUE", "here")
    assert OmegaConf.create({"a": "${oc.env:DEEPWRIGHT_TEST_VALUE}"}).a == "here"


def test_a_sweep_is_every_combination(plugins: Plugins) -> None:
    jobs = compose.sweep(["seed=1,2", "learn.steps=range(3,5)", "learn.every=2"], plugins)
    assert jobs == [
        ["seed=1", "learn.steps=3", "learn.every=2"],
        ["seed=1", "learn.steps=4", "learn.every=2"],
        ["seed=2", "learn.steps=3", "learn.every=2"],
        ["seed=2", "learn.steps=4", "learn.every=2"],
    ]
    assert compose.sweep(["experiment=glob(s*)", "seed=choice(4,5)"], plugins) == [
        ["experiment=slow", "seed=4"],
        ["experiment=slow", "seed=5"],
    ]


def test_an_outer_hydra_is_put_back(plugins: Plugins) -> None:
    with initialize_config_dir(str(compose.conf_directory()), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        assert compose.compose(["seed=4"], plugins)["seed"] == 4
        assert GlobalHydra.instance().hydra is outer


def test_threads_do_not_disturb_each_other(plugins: Plugins) -> None:
    seeds: list[int] = []

    def work(seed: int) -> None:
        seeds.append(compose.compose([f"seed={seed}"], plugins)["seed"] - seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seeds == [0] * 6


def test_a_saved_config_is_read_back_to_the_same_values(plugins: Plugins, tmp_path: Path) -> None:
    composed = compose.compose(["learn.rate=1e-3", "paths.root='a: b'"], plugins)
    path = tmp_path / "config.yaml"
    path.write_text(compose.to_yaml(composed))
    assert compose.load_resolved(path) == composed
    assert request.make("learn", [], plugins, str(path)).sections["learn"].rate == 1e-3


def test_a_saved_config_that_is_not_one_is_refused(plugins: Plugins, tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.yaml", tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    for path in (missing, broken):
        with pytest.raises(RequestError, match=path.name):
            request.make("learn", [], plugins, str(path))
    with pytest.raises(RequestError, match="not both"):
        request.make("learn", ["seed=1"], plugins, str(broken))


def test_a_misspelt_forced_stage_is_refused(plugins: Plugins) -> None:
    (problem,) = problems_of(plugins, "run.force=[lern]")
    assert "lern" in problem and "learn" in problem


class Sharp(ComponentConfig):
    """A router."""

    name: str = "sharp"
    edge: int = 1


class Soft(ComponentConfig):
    """Another router, with other keys."""

    name: str = "soft"
    warmth: int = 2


class Mixture(ComponentConfig):
    """A feed-forward part with a router in it."""

    name: str = "mixture"
    experts: int = 4
    router: Annotated[dict[str, Any], ComponentOf("router")] = Field({"name": "sharp"})


class Recipe(ComponentConfig):
    """An algorithm with components in it that have no group."""

    name: str = "recipe"
    advantage: Annotated[dict[str, Any], ComponentOf("advantage")] = Field({"name": "soft"})


class Training(BaseModel):
    """A stage with a place for an algorithm, and rewards by label."""

    model_config = ConfigDict(extra="forbid")

    algorithm: Annotated[dict[str, Any], ComponentOf("algorithm")] = {"name": "recipe"}
    rewards: Annotated[dict[str, Any], ComponentOf("reward", many=True)] = {"first": {"name": "sharp"}}


@pytest.fixture
def nested() -> Plugins:
    plugins = load([])
    for kind, name, config in (
        ("router", "sharp", Sharp),
        ("router", "soft", Soft),
        ("reward", "sharp", Sharp),
        ("advantage", "soft", Soft),
        ("ffn", "mixture", Mixture),
        ("algorithm", "recipe", Recipe),
        ("algorithm", "other", Soft),
        ("stage", "rl", Training),
        ("optimizer", "walk", Soft),
    ):
        plugins.registry.add(kind, name, config=config)(lambda config: config)
    return plugins


def test_components_in_components_are_written_out_whole(nested: Plugins) -> None:
    composed = compose.compose(["+model/ffn=mixture"], nested)
    assert composed["model"]["ffn"] == {"name": "mixture", "experts": 4, "router": {"name": "sharp", "edge": 1}}
    assert composed["rl"] == {
        "algorithm": {"name": "recipe", "advantage": {"name": "soft", "warmth": 2}},
        "rewards": {"first": {"name": "sharp", "edge": 1}},
    }


def test_another_choice_leaves_no_keys_of_the_first_behind(nested: Plugins) -> None:
    composed = compose.compose(["+model/ffn=mixture", "model/ffn/router=soft", "rl/algorithm=other"], nested)
    assert composed["model"]["ffn"]["router"] == {"name": "soft", "warmth": 2}
    assert composed["rl"]["algorithm"] == {"name": "other", "warmth": 2}
