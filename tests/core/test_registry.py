"""The registry: components by kind and name, and configs checked to the bottom, all problems at once."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.registry import ComponentConfig, ComponentOf, Provider, Registry, parse


class PlainRouter(ComponentConfig):
    """Sends tokens somewhere."""

    name: str = "plain"
    speed: float = Field(0.5, ge=0)
    groups: int = 1


class Mixture(ComponentConfig):
    """Has a router."""

    name: str = "mixture"
    experts: int = Field(4, ge=1)
    router: Annotated[dict[str, Any], ComponentOf("router")] = Field({"name": "plain"})

    @model_validator(mode="after")
    def _check(self) -> Mixture:
        if self.experts % 2:
            raise ValueError(f"experts is {self.experts}; expected an even number")
        return self


class Inner(BaseModel):
    """A part that is no component."""

    model_config = ConfigDict(extra="forbid")
    factor: float = Field(2.0, gt=0)
    length: int = 8


class Whole(BaseModel):
    """Everything at once."""

    model_config = ConfigDict(extra="forbid")
    width: int
    ffn: Annotated[dict[str, Any], ComponentOf("ffn")]
    rewards: Annotated[dict[str, Any], ComponentOf("router", many=True)] = {"first": {"name": "plain"}}
    inner: Inner = Inner()
    maybe: Inner | None = None
    labelled: dict[str, Inner] = {}


@pytest.fixture
def stocked() -> Registry:
    registry = Registry()
    registry.provider = Provider("ours", "deepwright-test", "1.0")
    registry.add("router", "plain", config=PlainRouter)(lambda config: ("plain router", config.speed))
    registry.add("ffn", "mixture", config=Mixture)(
        lambda config, width: (width, registry.build("router", config.router))
    )
    return registry


def problems_of(registry: Registry, values: dict[str, Any]) -> list[str]:
    with pytest.raises(RequestError) as caught:
        parse(Whole, values, "model", registry)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


# Components -----------------------------------------------------------------------------------------


def test_building_validates_and_gives_the_config_to_the_builder(stocked: Registry) -> None:
    assert stocked.build("ffn", {"name": "mixture", "router": {"name": "plain", "speed": 3}}, 7) == (
        7,
        ("plain router", 3.0),
    )
    with pytest.raises(RequestError, match=r"ffn\.experts is 0"):
        stocked.build("ffn", {"name": "mixture", "experts": 0}, 7)


def test_a_config_that_is_valid_already_is_taken_as_it_is(stocked: Registry) -> None:
    config = stocked.parse("ffn", {"name": "mixture", "experts": 6})
    assert stocked.parse("ffn", config) == config
    assert stocked.build("ffn", config, 1) == (1, ("plain router", 0.5))


def test_listing(stocked: Registry) -> None:
    stocked.add("router", "another", config=PlainRouter)(lambda config: None)
    assert stocked.names("router") == ["another", "plain"] and stocked.names("stage") == []
    assert [(c.kind, c.name) for c in stocked] == [("ffn", "mixture"), ("router", "another"), ("router", "plain")]
    component = stocked.get("router", "plain")
    assert component.config is PlainRouter and component.provider.plugin == "ours"
    assert component.doc == "Sends tokens somewhere."  # a lambda says nothing, so the config does


def test_the_builders_first_line_is_the_doc() -> None:
    registry = Registry()

    @registry.add("router", "said", config=PlainRouter)
    def build(config: PlainRouter) -> None:
        """Says what it is.

        And more.
        """

    assert registry.get("router", "said").doc == "Says what it is."
    assert build.__name__ == "build"


def test_a_taken_name_stays_whose_it_was(stocked: Registry) -> None:
    stocked.provider = Provider("stranger", "deepwright-stranger", "0.3")
    with pytest.raises(RequestError) as caught:
        stocked.add("router", "plain", config=Inner)
    assert caught.value.problems == [
        "Two plugins provide router 'plain': deepwright-test 1.0 (plugin ours) and deepwright-stranger 0.3 "
        "(plugin stranger). Rename one, or block one with --block stranger."
    ]
    assert stocked.get("router", "plain").config is PlainRouter
    stocked.add("ffn", "plain", config=Mixture)(lambda config, width: None)  # another kind, another name


def test_an_unknown_kind_is_refused(stocked: Registry) -> None:
    with pytest.raises(RequestError, match=r"Plugin ours registers kind 'routr'\. Did you mean router\?"):
        stocked.add("routr", "mine", config=PlainRouter)


def test_forgetting_a_provider_leaves_the_others(stocked: Registry) -> None:
    stranger = Provider("stranger")
    stocked.provider = stranger
    stocked.add("router", "strange", config=PlainRouter)(lambda config: None)
    stocked.forget(stranger)
    assert stocked.names("router") == ["plain"] and stocked.names("ffn") == ["mixture"]


def test_configs_do_not_change(stocked: Registry) -> None:
    config = stocked.parse("router", {"name": "plain"})
    with pytest.raises(ValueError, match="frozen"):
        config.speed = 3


# Problems -------------------------------------------------------------------------------------------


def test_all_problems_at_once_each_with_its_path(stocked: Registry) -> None:
    values = {
        "widht": 3,
        "ffn": {
            "name": "mixture",
            "experts": 0,
            "expert": 3,
            "router": {"name": "plain", "speeed": 1, "groups": "many"},
        },
        "rewards": {"a": {"name": "plain", "speed": -1}, "b": {"name": "plan"}, "c": {"name": "plain"}},
        "inner": {"factor": 0, "lenght": 4},
        "maybe": {"factr": 1},
        "labelled": {"x": {"lenght": 4}},
    }
    problems = problems_of(stocked, values)
    assert sorted(problems) == sorted(
        [
            "model.ffn.router.groups is 'many'; input should be a valid integer, unable to parse string as an integer.",
            "model.ffn.router.speeed is not an option of PlainRouter. Did you mean speed? Known: groups, name, speed.",
            "model.ffn.experts is 0; input should be greater than or equal to 1.",
            "model.ffn.expert is not an option of Mixture. Did you mean experts? Known: experts, name, router.",
            "model.rewards.a.speed is -1; input should be greater than or equal to 0.",
            "model.rewards.b.name: There is no router called 'plan'. Did you mean plain? Known: plain.",
            "model.inner.factor is 0; input should be greater than 0.",
            "model.inner.lenght is not an option of Inner. Did you mean length? Known: factor, length.",
            "model.maybe.factr is not an option of Inner. Did you mean factor? Known: factor, length.",
            "model.labelled.x.lenght is not an option of Inner. Did you mean length? Known: factor, length.",
            "model.width is missing; give it a value.",
            "model.widht is not an option of Whole. Did you mean width? Known: ffn, inner, labelled, maybe, "
            "rewards, width.",
        ]
    )


def test_a_validators_own_sentence_is_kept(stocked: Registry) -> None:
    values = {"width": 1, "ffn": {"name": "mixture", "experts": 3}}
    assert problems_of(stocked, values) == ["model.ffn: experts is 3; expected an even number."]


@pytest.mark.parametrize(
    ("part", "problem"),
    [
        ({"name": "mixtur"}, "model.ffn.name: There is no ffn called 'mixtur'. Did you mean mixture? Known: mixture."),
        ({"name": "zzz"}, "model.ffn.name: There is no ffn called 'zzz'. Known: mixture."),
        ({"experts": 4}, "model.ffn.name is None; expected one of: mixture."),
        ({"name": 3}, "model.ffn.name is 3; expected one of: mixture."),
        ("mixture", "model.ffn is 'mixture'; input should be a valid dictionary."),
        (None, "model.ffn is None; input should be a valid dictionary."),
    ],
)
def test_what_is_no_component_is_refused(stocked: Registry, part: Any, problem: str) -> None:
    assert problems_of(stocked, {"width": 1, "ffn": part}) == [problem]


def test_what_is_no_component_among_many_is_refused(stocked: Registry) -> None:
    values = {"width": 1, "ffn": {"name": "mixture"}, "rewards": {"a": 3}}
    assert problems_of(stocked, values) == ["model.rewards.a is 3; expected a mapping with a name, one of: plain."]


def test_a_component_alone_is_named_by_its_kind_or_by_where_it_stands(stocked: Registry) -> None:
    for where, path in ((None, "router"), ("rl.rewards.x", "rl.rewards.x")):
        with pytest.raises(RequestError, match=f"^{path}.speed is 'fast'; input should be a valid number"):
            stocked.parse("router", {"name": "plain", "speed": "fast"}, where)


# What is kept ---------------------------------------------------------------------------------------


def test_defaults_are_filled_in_to_the_bottom(stocked: Registry) -> None:
    whole = parse(
        Whole, {"width": 2, "ffn": {"name": "mixture", "router": {"name": "plain", "groups": 3}}}, "m", stocked
    )
    assert whole.ffn == {"name": "mixture", "experts": 4, "router": {"name": "plain", "speed": 0.5, "groups": 3}}
    assert whole.rewards == {"first": {"name": "plain", "speed": 0.5, "groups": 1}}
    assert whole.inner == Inner() and whole.maybe is None
    again = parse(Whole, whole.model_dump(), "m", stocked)
    assert again == whole


def test_the_given_mapping_is_not_changed(stocked: Registry) -> None:
    values = {"width": 2, "ffn": {"name": "mixture"}, "inner": {"factor": 1}}
    parse(Whole, values, "m", stocked)
    assert values == {"width": 2, "ffn": {"name": "mixture"}, "inner": {"factor": 1}}


def test_a_misspelt_yarn_option_is_explained_by_yarn(registry: Registry) -> None:
    values = {
        "hidden_size": 8,
        "layers": 1,
        "intermediate_size": 8,
        "rope": {"yarn": {"factr": 3}},
        "attention": {"name": "gqa"},
        "ffn": {"name": "dense"},
    }
    with pytest.raises(
        RequestError, match=r"model\.rope\.yarn\.factr is not an option of YarnConfig\. Did you mean factor"
    ):
        parse(ModelConfig, values, "model", registry)
