"""DeepSeekMoE against a loop over tokens and experts: values, every gradient, load, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import Part, count
from deepwright_core.model.directory import load_model, save_model
from deepwright_core.model.feed_forward import Mixture
from deepwright_core.model.record import ForwardRecord
from deepwright_core.model.transformer import Transformer, build_model, initialise
from deepwright_core.registry import Registry
from deepwright_core.training.objective import language_model_loss
from deepwright_moe.mixture import MixtureOfExperts

HIDDEN = 6


def model_config(ffn: dict[str, Any], **changes: Any) -> ModelConfig:
    values: dict[str, Any] = {"vocab_size": 30, "hidden_size": HIDDEN, "layers": 2, "intermediate_size": 5}
    attention = {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4}
    return ModelConfig(**{**values, "attention": attention, "ffn": ffn, **changes})


def build(registry: Registry, **options: Any) -> MixtureOfExperts:
    ffn = {"name": "moe", "experts": 6, "top_k": 2, "intermediate_size": 5, "shared_experts": 1, **options}
    mixture = registry.build("ffn", ffn, model_config(ffn), 1)
    initialise(mixture, 0.5, torch.Generator().manual_seed(0))
    return mixture


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    inner = gate @ x
    return down @ (inner * torch.sigmoid(inner) * (up @ x))


def by_loops(mixture: MixtureOfExperts, x_BSD: Tensor) -> Tensor:
    """Token by token, expert by expert. Only which experts a token goes to is asked of the router."""
    rows = []
    routing = mixture.router(x_BSD.flatten(0, 1))
    for x_D, experts_K, weights_K in zip(
        x_BSD.flatten(0, 1), routing.experts_TK.tolist(), routing.weights_TK, strict=True
    ):
        out = torch.zeros_like(x_D)
        for expert, weight in zip(experts_K, weights_K, strict=True):
            gate, up = mixture.experts.gate_up_EID[expert].chunk(2)
            out = out + weight * swiglu(x_D, gate, up, mixture.experts.down_EDI[expert])
        if mixture.shared is not None:
            out = out + swiglu(x_D, mixture.shared.gate.weight, mixture.shared.up.weight, mixture.shared.down.weight)
        rows.append(out)
    return torch.stack(rows).view_as(x_BSD)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared_experts": 0},
        {"shared_experts": 2, "top_k": 3},
        {"experts": 8, "top_k": 3, "router": {"name": "noaux_tc", "groups": 4, "top_groups": 2, "scaling": 2.5}},
        {"experts": 8, "top_k": 3, "router": {"name": "group_limited_greedy", "groups": 4, "top_groups": 2}},
        {"top_k": 6},
        {"experts": 1, "top_k": 1},
    ],
    ids=["plain", "no shared", "two shared", "groups", "softmax groups", "all", "one expert"],
)
def test_values_and_every_gradient_are_those_of_the_loops(registry: Registry, options: dict[str, Any]) -> None:
    mixture = build(registry, **options)
    x_BSD = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(2))
    names = ["x", *(name for name, _ in mixture.named_parameters())]
    results = []
    for form in (lambda x: mixture(x, None), lambda x: by_loops(mixture, x)):
        x = x_BSD.clone().requires_grad_()
        out = form(x)
        gradients = torch.autograd.grad((out * upstream).sum(), [x, *mixture.parameters()], allow_unused=True)
        results.append((out, gradients))
    (have, have_gradients), (want, want_gradients) = results
    torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-4)
    for name, ours, theirs in zip(names, have_gradients, want_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def send_everything_to(mixture: MixtureOfExperts, experts: list[int]) -> None:
    mixture.router.bias_E.fill_(0.0)
    mixture.router.bias_E[experts] = 10.0


def test_trap_4_no_token_is_dropped_when_all_go_to_the_same_experts(registry: Registry) -> None:
    """The other experts are empty; their gradient is exactly zero."""
    mixture = build(registry)
    send_everything_to(mixture, [1, 4])
    x_BSD = torch.randn(3, 50, HIDDEN)
    record = ForwardRecord()
    out = mixture(x_BSD, record)
    assert record.loads[1].tolist() == [0, 150, 0, 0, 150, 0]
    torch.testing.assert_close(out, by_loops(mixture, x_BSD), atol=1e-5, rtol=1e-4)
    out.square().sum().backward()
    used = mixture.experts.down_EDI.grad.abs().amax((1, 2)) > 0
    assert used.tolist() == [False, True, False, False, True, False]
    assert torch.isfinite(mixture.experts.gate_up_EID.grad).all()


def test_a_token_is_computed_the_same_in_any_company(registry: Registry) -> None:
    mixture = build(registry)
    x_BSD = torch.randn(1, 40, HIDDEN)
    together = mixture(x_BSD, None)
    for t in (0, 17, 39):
        torch.testing.assert_close(mixture(x_BSD[:, t : t + 1], None), together[:, t : t + 1], atol=1e-6, rtol=1e-5)


def test_trap_4_shared_experts_have_no_gate_and_their_widths_add_up(registry: Registry) -> None:
    shared = build(registry, shared_experts=3).shared
    assert shared.gate.weight.shape == shared.up.weight.shape == (15, HIDDEN)
    assert build(registry, shared_experts=0).shared is None
    assert {name for name, _ in shared.named_parameters()} == {"gate.weight", "up.weight", "down.weight"}


def test_load_and_loss_ignore_padding(registry: Registry) -> None:
    mixture = build(registry, balance_loss=0.5)
    x_BSD = torch.randn(2, 6, HIDDEN)
    real_BS = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    record = ForwardRecord(real_BS)
    mixture(x_BSD, record)
    experts_TK = mixture.router(x_BSD.flatten(0, 1)).experts_TK
    want = torch.bincount(experts_TK[real_BS.flatten()].flatten(), minlength=6)
    assert record.loads[1].tolist() == want.tolist() and want.sum() == 6 * 2
    changed = ForwardRecord(real_BS)
    mixture(x_BSD.masked_fill(~real_BS[..., None], 3.0), changed)
    torch.testing.assert_close(changed.losses[1], record.losses[1])
    assert record.losses[1] > 0


def test_the_balance_loss_is_weighted_and_can_be_turned_off(registry: Registry) -> None:
    x_BSD = torch.randn(2, 6, HIDDEN)
    losses = []
    for weight in (1.0, 1e-4, 0.0):
        record = ForwardRecord()
        build(registry, balance_loss=weight)(x_BSD, record)
        losses.append(record.losses.get(1))
    assert losses[2] is None
    torch.testing.assert_close(losses[1], losses[0] * 1e-4)


def transformer(registry: Registry, router: dict[str, Any] | None = None, **changes: Any) -> Transformer:
    ffn: dict[str, Any] = {"name": "moe", "experts": 4, "top_k": 2, "intermediate_size": 5, "balance_loss": 0.01}
    if router is not None:
        ffn["router"] = router
    return build_model(registry, model_config(ffn, init_std=0.3, **changes), seed=0)


def test_the_objective_adds_every_layers_balance_loss_once(registry: Registry) -> None:
    model = transformer(registry, layers=3, first_dense_layers=1, mtp={"depth": 2, "loss_weight": 0.3})
    loss = language_model_loss(model, torch.randint(30, (2, 9)))
    assert sorted(loss.record.losses) == [1, 2, 3, 4]  # two mixtures of the trunk, two of the MTP modules
    want = loss.next_token + 0.3 * loss.further + sum(loss.record.losses.values())
    torch.testing.assert_close(loss.total, want)
    assert [int(load.sum()) for _, load in sorted(loss.record.loads.items())] == [2 * 8 * 2] * 2 + [
        2 * 7 * 2,
        2 * 6 * 2,
    ]


def test_a_mixture_says_what_it_costs(registry: Registry) -> None:
    cost = count(transformer(registry, layers=3, first_dense_layers=1, mtp={"depth": 1}))
    expert = 3 * HIDDEN * 5
    assert cost.parts["routed_experts"] == Part(2 * 4 * expert, 2 * 2 * expert)
    assert cost.parts["shared_experts"] == Part(2 * expert, 2 * expert)
    assert cost.parts["routers"] == Part(2 * 4 * HIDDEN, 2 * 4 * HIDDEN)
    assert cost.parts["dense_ffn"].total == expert
    assert (cost.mixture, cost.mixture_layers) == (Mixture(experts=4, top_k=2, shared=1), 2)


def test_each_layers_load_corrects_that_layers_router(registry: Registry) -> None:
    model = transformer(registry, layers=3, first_dense_layers=1, mtp={"depth": 1})
    model.balance({2: torch.tensor([9, 0, 1, 2]), 3: torch.tensor([0, 0, 0, 8])})
    assert model.layers[1].ffn.router.bias_E.tolist() == [0.0] * 4
    step = [-0.001, 0.001, 0.001, 0.001]
    assert model.layers[2].ffn.router.bias_E.tolist() == pytest.approx(step)
    assert model.mtp[0].block.ffn.router.bias_E.tolist() == pytest.approx(step[::-1])


def test_a_router_without_a_bias_trains_and_is_left_alone_by_the_balance(registry: Registry, tmp_path: Path) -> None:
    """DeepSeek-V2: the auxiliary loss reaches the router, and the load is still counted."""
    router = {"name": "group_limited_greedy", "groups": 2, "top_groups": 1, "scaling": 4.0}
    model = transformer(registry, router, layers=3, first_dense_layers=1, mtp={"depth": 1})
    tokens_BS = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(0))
    loss = language_model_loss(model, tokens_BS)
    loss.total.backward()
    assert sorted(loss.record.loads) == [1, 2, 3] and all(each.item() > 0 for each in loss.record.losses.values())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.balance(loss.record.loads)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for block in (model.layers[1], model.layers[2], model.mtp[0].block):
        assert block.ffn.router.weight.grad.abs().sum() > 0
    save_model(model, tmp_path)
    assert not any("bias" in name for name in load_model(tmp_path, registry).state_dict())


def test_the_bias_is_saved_with_the_model_and_stays_float32(registry: Registry, tmp_path: Path) -> None:
    model = transformer(registry)
    model.balance({0: torch.tensor([9, 0, 1, 2])})
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, registry, dtype=torch.bfloat16)
    bias = loaded.layers[0].ffn.router.bias_E
    assert bias.dtype == torch.float32 and torch.equal(bias, model.layers[0].ffn.router.bias_E)
    assert bias.abs().min() > 0
    assert loaded.layers[0].ffn.router.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"top_k": 7}, "top_k is 7; expected at most experts, which is 6"),
        (
            {"router": {"name": "noaux_tc", "groups": 4}},
            "experts is 6; expected a multiple of router.groups, which is 4",
        ),
        (
            {"router": {"name": "noaux_tc", "groups": 6}},
            "router.groups is 6; expected at least 2 of the 6 experts in each",
        ),
        (
            {"router": {"name": "noaux_tc", "groups": 2, "top_groups": 3}},
            "router.top_groups is 3; expected at most router.groups, which is 2",
        ),
        (
            {"top_k": 4, "router": {"name": "noaux_tc", "groups": 2, "top_groups": 1}},
            "top_k is 4; expected at most the 3 experts that 1 groups hold",
        ),
        ({"router": {"name": "noaux_tc", "groups": 0}}, "input should be greater than or equal to 1"),
        ({"router": {"name": "noaux"}}, "Did you mean noaux_tc?"),
        (
            {"router": {"name": "group_limited_greedy", "groups": 4}},
            "experts is 6; expected a multiple of router.groups, which is 4",
        ),
        (
            {"router": {"name": "group_limited_greedy", "bias_update_speed": 0.1}},
            "ffn.router.bias_update_speed is not an option of SoftmaxRouterConfig",
        ),
        ({"expert": 4}, "ffn.expert is not an option of MoEConfig. Did you mean experts"),
    ],
)
def test_impossible_combinations_are_refused(registry: Registry, options: dict[str, Any], problem: str) -> None:
    ffn = {"name": "moe", "experts": 6, "top_k": 2, "intermediate_size": 5, **options}
    with pytest.raises(RequestError) as caught:
        registry.parse("ffn", ffn)
    assert len(caught.value.problems) == 1
    assert problem in str(caught.value)
