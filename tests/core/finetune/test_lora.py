"""LoRA against W + scale · B A written out: the start, the gradient, what trains, what is left when it is over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.finetune.lora import Lora, LoraConfig
from deepwright_core.model.precision import autocast
from deepwright_core.model.transformer import Transformer
from deepwright_core.model.vocabulary import grow_vocabulary
from deepwright_core.registry import Registry
from deepwright_core.stage import StageContext
from deepwright_core.tracking import JsonlTracker, SilentProgress
from deepwright_core.training.objective import language_model_loss
from deepwright_core.training.trainer import Metrics, Trainer, TrainingConfig, train

Build = Callable[..., Transformer]
CONFIG = LoraConfig(rank=3, alpha=6.0)
SCALE = 2.0
ADAPTED = {
    *(f"{block}.attention.{part}.weight" for block in ("layers.0", "layers.1", "mtp.0.block") for part in "qkvo"),
    *(f"{block}.ffn.experts.weight_EDD" for block in ("layers.1", "mtp.0.block")),
}


def rows(seed: int = 0) -> Tensor:
    return torch.randint(24, (3, 9), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Transformer) -> Tensor:
    return language_model_loss(model, rows()).total


def values(model: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def stirred(lora: Lora) -> Lora:
    """With factors that are not zero."""
    generator = torch.Generator().manual_seed(5)
    for tensor in lora.factors().values():
        tensor.data = torch.randn(tensor.shape, generator=generator) * 0.2
    return lora


def sums(lora: Lora) -> dict[str, Tensor]:
    """W + scale · B A, written out."""
    factors = lora.factors()
    return {
        path: weight + SCALE * torch.einsum("...nr,...rk->...nk", factors[f"{path}.b_NR"], factors[f"{path}.a_RK"])
        for path, weight in lora.originals().items()
    }


def test_the_first_step_sees_exactly_the_model_that_was_given(build: Build) -> None:
    model = build()
    before, weights = loss_of(model).detach(), values(model)
    lora = Lora(CONFIG, model, seed=0)
    assert torch.equal(loss_of(model).detach(), before)
    assert lora.originals().keys() == ADAPTED
    assert all(torch.equal(weight, weights[path]) for path, weight in lora.originals().items())
    assert all(bool(t.any()) == name.endswith("a_RK") for name, t in lora.factors().items())


def test_a_stack_of_experts_has_a_pair_of_factors_for_each(build: Build) -> None:
    factors = Lora(CONFIG, build(), seed=0).factors()
    assert factors["layers.1.ffn.experts.weight_EDD.a_RK"].shape == (3, 3, 8)
    assert factors["layers.1.ffn.experts.weight_EDD.b_NR"].shape == (3, 8, 3)
    assert factors["layers.0.attention.k.weight.a_RK"].shape == (3, 8)
    assert factors["layers.0.attention.k.weight.b_NR"].shape == (4, 3)


def test_gradients_are_those_of_the_sum_written_out(build: Build) -> None:
    model, plain = build(), build()
    lora = stirred(Lora(CONFIG, model, seed=0))
    factors = list(lora.factors().values())
    have = torch.autograd.grad(loss_of(model), factors)

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain

        def forward(self) -> Tensor:
            return loss_of(self.model)

    replaced = {f"model.{path}": weight for path, weight in sums(lora).items()}
    want = torch.autograd.grad(functional_call(Loss(), replaced, ()), factors)
    for name, ours, theirs in zip(lora.factors(), have, want, strict=True):
        assert theirs.abs().max() > 1e-4, name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)


def trainer_of(registry: Registry, model: Transformer, optimizer: str, lora: Lora) -> Trainer:
    built = registry.build("optimizer", {"name": optimizer}, model, lr=0.01)
    return Trainer(model, built, lambda step: 1.0, clip=1.0, balances=lora.balances)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_the_factors_train(build: Build, registry: Registry, optimizer: str) -> None:
    model = build()
    before = values(model)
    lora = Lora(CONFIG, model, seed=0)
    trainer = trainer_of(registry, model, optimizer, lora)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(tensor) for tensor in lora.factors().values()}
    first = loss_of(model).item()
    for step in range(8):
        trainer.update(step, [lambda: language_model_loss(model, rows())])
    assert loss_of(model).item() < first - 0.05
    frozen = {name: tensor for name, tensor in model.state_dict().items() if "a_RK" not in name and "b_NR" not in name}
    renamed = {name.replace("parametrizations.", "").replace(".original", ""): t for name, t in frozen.items()}
    assert renamed.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in renamed.items())


def test_a_router_that_is_frozen_is_not_corrected(
    build: Build, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, told = build(), []
    monkeypatch.setattr(model, "balance", told.append)
    trainer = trainer_of(registry, model, "adamw", Lora(CONFIG, model, seed=0))
    trainer.update(0, [lambda: language_model_loss(model, rows())])
    trainer.update(1, [lambda: language_model_loss(model, rows())], rebalance=False)
    trainer.rebalance()
    assert told == []


def test_what_is_left_is_a_plain_model_with_the_sums_as_weights(build: Build) -> None:
    model = build()
    before = values(model)
    lora = stirred(Lora(CONFIG, model, seed=0))
    want = {path: weight.detach() for path, weight in sums(lora).items()}
    lora.merge()
    after = values(model)
    assert list(after) == list(before)
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, want.get(name, before[name]), rtol=1e-6, atol=1e-7)
        assert name in ADAPTED or torch.equal(tensor, before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("arametrized" in type(module).__name__ for module in model.modules())


def test_the_merged_model_answers_as_the_one_that_trained(build: Build) -> None:
    model = build()
    lora = stirred(Lora(CONFIG, model, seed=0))
    with torch.no_grad():
        trained = model.logits(model(rows()))
        lora.merge()
        assert torch.equal(model.logits(model(rows())), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_samples_and_what_trains_are_the_same_policy(build: Build, dtype: torch.dtype) -> None:
    model = build()
    lora = stirred(Lora(CONFIG, model, seed=0))
    weight = model.layers[0].attention.q.weight
    assert weight.requires_grad
    with torch.no_grad(), autocast(torch.device("cpu"), dtype):
        trained = model(rows())
        # The sum is not rounded to bf16, where most of a small correction would be lost.
        assert torch.equal(model.layers[0].attention.q.weight, weight)
        with lora.sampling():
            assert torch.equal(model(rows()), trained)


def test_sampling_forms_each_sum_once_and_leaves_nothing_behind(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    lora = stirred(Lora(CONFIG, model, seed=0))
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    engine = Engine(model, eos_id=99, cache_tokens=128)
    params = SamplingParams(max_tokens=6, temperature=1.0)
    slow = engine.generate([[1, 2, 3]], params)
    engine.update_weights()
    with lora.sampling():
        kept = model.layers[0].attention.q.weight
        fast = engine.generate([[1, 2, 3]], params)
        assert model.layers[0].attention.q.weight is kept
    assert (fast[0].token_ids, fast[0].logprobs) == (slow[0].token_ids, slow[0].logprobs)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    with pytest.raises(KeyError), lora.sampling():
        raise KeyError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    loss_of(model).backward()  # and the weights of the next step are sums of what was trained
    assert all(tensor.grad is not None for tensor in lora.factors().values())


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_new_tokens_train_beside_the_adapters(build: Build, registry: Registry, tied: bool) -> None:
    """They begin as one and the same row: frozen, no model could tell <think> from </think>."""
    model = build(tied_head=tied)
    assert grow_vocabulary(model, 27) == 3
    before = values(model)
    tokens = torch.cat([rows(), torch.tensor([[24, 1, 25], [26, 25, 24], [2, 26, 26]])], 1)
    first = language_model_loss(model, tokens).total.detach()
    lora = Lora(CONFIG, model, seed=0, new_rows=3)
    assert torch.equal(language_model_loss(model, tokens).total.detach(), first)
    rows_of = [name for name in lora.factors() if name.endswith("rows_XK")]
    assert rows_of == ["embedding.weight.rows_XK"] + ["head.weight.rows_XK"] * (not tied)
    trainer = trainer_of(registry, model, "adamw", lora)
    for step in range(5):
        trainer.update(step, [lambda: language_model_loss(model, tokens)])
    with torch.no_grad():
        trained = model.logits(model(tokens))
        with lora.sampling():
            assert torch.equal(model.logits(model(tokens)), trained)
        lora.merge()
        assert torch.equal(model.logits(model(tokens)), trained)
    assert values(model).keys() == before.keys() and (model.head.weight is model.embedding.weight) == tied
    for name in ("embedding.weight", "head.weight"):
        after = values(model)[name]
        assert torch.equal(after[:24], before[name][:24])
        assert torch.pdist(after[24:]).min() > 1e-3 > torch.pdist(before[name][24:]).max()


def test_new_rows_of_a_head_that_is_adapted_too(build: Build) -> None:
    model = build()
    grow_vocabulary(model, 26)
    lora = Lora(LoraConfig(rank=2, alpha=2.0, targets=["head"]), model, seed=0, new_rows=2)
    stirred(lora)
    factors, given = lora.factors(), lora.originals()["head.weight"]
    kept = torch.cat([given[:24], factors["head.weight.rows_XK"]])
    want = kept + factors["head.weight.b_NR"] @ factors["head.weight.a_RK"]
    torch.testing.assert_close(model.head.weight, want)


def test_the_seed_decides_the_factors(build: Build) -> None:
    first, again, other = (Lora(CONFIG, build(), seed).factors() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("a_RK"))


class Cut(Exception):
    """The plug is pulled."""


def run(
    build: Build, registry: Registry, directory: Path, cut: int | None = None
) -> tuple[Transformer, dict[str, Path]]:
    directory.mkdir(exist_ok=True)
    model = build()
    lora = Lora(CONFIG, model, seed=0)
    trainer = trainer_of(registry, model, "muon", lora)

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return lambda **event: None

    context = StageContext(directory, JsonlTracker(directory / "metrics.jsonl"), SilentProgress(), registry, Silent())

    def step(number: int) -> Metrics:
        if number == cut:
            raise Cut
        return {"loss": 0.0, **trainer.update(number, [lambda: language_model_loss(model, rows(number))])}

    train("toy", trainer, TrainingConfig(steps=6, lr=0.01, save_every=2), context, step, {})
    (newest,) = (directory / "checkpoints").glob("step-00000006")
    stored = {path.name: path for path in newest.iterdir()}
    lora.finish(directory)
    return model, stored


def test_a_cut_run_ends_like_an_uncut_one_and_checkpoints_hold_what_trains(
    build: Build, registry: Registry, tmp_path: Path
) -> None:
    whole, stored = run(build, registry, tmp_path / "whole")
    names = load_file(stored["model.safetensors"]).keys()
    assert len(names) == 2 * len(ADAPTED) and all(name.endswith(("a_RK", "b_NR")) for name in names)
    for cut in (3, 5):
        with pytest.raises(Cut):
            run(build, registry, tmp_path / "cut", cut)
    resumed, _ = run(build, registry, tmp_path / "cut")
    for name, tensor in values(whole).items():
        assert torch.equal(values(resumed)[name], tensor), name
    trained, given = (values(model)["layers.1.ffn.experts.weight_EDD"] for model in (whole, build()))
    assert not torch.equal(trained, given)


def test_what_is_reported(build: Build) -> None:
    model = build()
    total = sum(p.numel() for p in model.parameters())
    lora = Lora(CONFIG, model, seed=0)
    trained = 3 * 3 * ((8 + 8) + 2 * (8 + 4) + (8 + 8)) + 2 * 3 * 3 * (8 + 8)
    assert lora.metrics == {"parameters_trained": trained, "parameters_trained_share": trained / total}
    (note,) = lora.notes
    assert f"{trained:,} parameters trained" in note and f"{total:,}" in note


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 0}, "finetune.rank is 0"),
        ({"alpha": 0}, "finetune.alpha is 0"),
        ({"targets": []}, "finetune.targets is []"),
        ({"targets": ["ffn..experts"]}, "finetune.targets: targets holds 'ffn..experts'"),
        ({"target": ["ffn"]}, "finetune.target is not an option of LoraConfig. Did you mean targets"),
    ],
)
def test_wrong_options_are_sentences(registry: Registry, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError) as error:
        registry.parse("finetune", {"name": "lora", **changes})
    assert error.value.problems[0].startswith(says)
