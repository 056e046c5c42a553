"""Every recipe, and every choice that the documents name, composes and is valid as it stands."""

import pytest

from deepwright_core.plugins import Plugins, installed
from flows import request


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return installed()


@pytest.mark.parametrize("experiment", ["cpu_demo", "smoke"])
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model/attention=gqa", "model/ffn=dense"],
        ["model/attention=gqa"],
        ["model/ffn=dense"],
        ["model/ffn=moe", "model.ffn.router.groups=4", "model.ffn.router.top_groups=2"],
        ["model/ffn/router=group_limited_greedy"],
        ["model=tiny_dense"],
        ["model=mini"],
        ["optimizer=adamw", "schedule=constant"],
        ["rl/algorithm=dr_grpo"],
        ["rl/algorithm=dapo", "rl.lr=1e-4"],
        ["data=text", "data.path=books/*.txt"],
        ["tokenizer=file", "tokenizer.path=somewhere"],
        ["finetune=lora", "finetune.targets=[attention,ffn.experts,ffn.shared,ffn.gate]"],
        ["precision=bf16", "threads=1", "seed=7"],
        ["kernels=reference", "kernels.rms_norm=torch"],
    ],
)
def test_it_composes_and_is_valid(plugins: Plugins, experiment: str, overrides: list[str]) -> None:
    checked = request.make("pipeline", [f"experiment={experiment}", *overrides], plugins)
    assert [stage.name for stage in checked.stages] == ["prepare", "pretrain", "sft", "rl", "distill", "serve"]


def test_the_demo_balances_its_experts_faster_than_v3(plugins: Plugins) -> None:
    """A choice of model/ffn leaves nothing behind, so the speed belongs to the option and not to the model."""
    demo = request.make("pipeline", [], plugins).sections["model"]
    assert demo.ffn["router"]["bias_update_speed"] == 0.003
