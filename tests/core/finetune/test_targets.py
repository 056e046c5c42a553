"""Which matrices a target means, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from deepwright_core.config import validate
from deepwright_core.errors import RequestError
from deepwright_core.finetune import targets
from deepwright_core.finetune.full import FullConfig
from deepwright_core.finetune.lora import LoraConfig
from deepwright_core.model.transformer import Transformer
from deepwright_core.registry import Registry

Build = Callable[..., Transformer]


@pytest.mark.parametrize(
    ("target", "means"),
    [
        ("attention.q", ["layers.0.attention.q", "layers.1.attention.q", "mtp.0.block.attention.q"]),
        ("layers.1.attention.o", ["layers.1.attention.o"]),
        ("ffn.experts", ["layers.1.ffn.experts.weight_EDD", "mtp.0.block.ffn.experts.weight_EDD"]),
        ("ffn.gate", ["layers.0.ffn.gate"]),
        ("projection", ["mtp.0.projection"]),
        ("mtp.0.block.attention.v", ["mtp.0.block.attention.v"]),
        ("attent", []),
        ("norm", []),  # a vector
    ],
)
def test_a_target_is_whole_names_in_a_path(build: Build, target: str, means: list[str]) -> None:
    found = targets.chosen(build(), [target])
    assert [name.removesuffix(".weight") for name in found] == means


def test_a_target_that_matches_nothing_is_named_with_what_there_is(build: Build) -> None:
    (problem,) = LoraConfig(targets=["attention", "ffn.expert"]).problems(build, "finetune")
    assert problem == (
        "finetune.targets holds 'ffn.expert', and no matrix of the model is called so. It has: attention.k, "
        "attention.o, attention.q, attention.v, embedding, ffn.down, ffn.experts.weight_EDD, ffn.gate, ffn.up, head, "
        "projection."
    )


def test_a_tied_head_is_not_parted_from_its_embedding(build: Build) -> None:
    (problem,) = LoraConfig(targets=["embedding"]).problems(lambda: build(tied_head=True), "finetune")
    assert problem.startswith("finetune.targets would part embedding.weight and head.weight, which are one matrix")
    assert LoraConfig(targets=["embedding", "head"]).problems(build, "finetune") == []


def test_the_whole_model_needs_no_targets() -> None:
    def never() -> Transformer:
        raise AssertionError("built for nothing")

    assert FullConfig().problems(never, "finetune") == []


def test_targets_are_checked_with_the_configuration(build: Build, registry: Registry) -> None:
    """Before anything starts, and whatever the vocabulary's size will be."""
    model = build().config.model_copy(update={"vocab_size": 0}).model_dump()
    assert validate(registry, {"model": model, "finetune": {"name": "lora"}})["finetune"].rank == 8
    with pytest.raises(RequestError) as error:
        validate(registry, {"model": model, "finetune": {"name": "lora", "targets": ["ffn.shared", "moe"]}})
    assert [problem.split(",")[0] for problem in error.value.problems] == [
        "finetune.targets holds 'ffn.shared'",
        "finetune.targets holds 'moe'",
    ]
