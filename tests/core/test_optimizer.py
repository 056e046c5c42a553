"""Optimizers: which parameter is in which group, and each update against one written out."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from deepwright_core.registry import Registry
from deepwright_core.training import optimizer as optimizer_module
from deepwright_core.training.optimizer import Matrices, Muon, MuonConfig, batches


class Little(nn.Module):
    """One parameter of every kind, under the names that the model uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.block = nn.ModuleDict({"wide": nn.Linear(6, 4, bias=False), "router": nn.Linear(4, 3, bias=False)})
        self.experts = nn.Parameter(torch.empty(3, 5, 4))
        self.norm = nn.RMSNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)

    def fill_gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def groups_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[tuple[set[str], dict[str, Any]]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group) for group in optimizer.param_groups]


def test_adamw_decays_matrices_and_not_vectors(registry: Registry) -> None:
    model = Little()
    optimizer = registry.build("optimizer", {"name": "adamw", "weight_decay": 0.3}, model, lr=0.01)
    (matrices, first), (vectors, second) = groups_of(optimizer, model)
    assert vectors == {"norm.weight"}
    assert matrices | vectors == {name for name, _ in model.named_parameters()}
    assert (first["weight_decay"], second["weight_decay"]) == (0.3, 0.0)
    assert {group["peak_lr"] for group in optimizer.param_groups} == {0.01}
    assert first["betas"] == (0.9, 0.95)


class AdamWByHand:
    """Loshchilov & Hutter 2019, for one tensor, in float64."""

    def __init__(self, value: Tensor, lr: float, decay: float) -> None:
        self.value, self.lr, self.decay = value.double(), lr, decay
        self.m, self.v, self.t = torch.zeros_like(self.value), torch.zeros_like(self.value), 0

    def step(self, gradient: Tensor) -> None:
        g, self.t = gradient.double(), self.t + 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.95 * self.v + 0.05 * g * g
        corrected = (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.95**self.t)).sqrt() + 1e-8)
        self.value = self.value - self.lr * self.decay * self.value - self.lr * corrected


def muon_by_hand(value: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Jordan et al. 2024 with Nesterov momentum 0.95, five Newton-Schulz steps, and Moonlight's scale; one matrix."""
    value, momentum = value.double(), torch.zeros_like(value, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        x = 0.05 * gradient.double() + 0.95 * momentum
        x = x / x.norm()
        for _ in range(5):
            if x.shape[0] <= x.shape[1]:
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            else:
                gram = x.T @ x
                x = 3.4445 * x + x @ (-4.7750 * gram + 2.0315 * gram @ gram)
        value = value * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(value.shape)) * x
    return value


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_three_steps_are_those_by_hand(registry: Registry, name: str) -> None:
    """AdamW on everything; Muon on hidden matrices (experts one by one), AdamW on embedding, head, router and norm."""
    model, lr, decay = Little(), 0.02, 0.1
    exact = {"newton_schulz_precision": "fp32"} if name == "muon" else {}
    optimizer = registry.build("optimizer", {"name": name, "weight_decay": decay, **exact}, model, lr=lr)
    start = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    gradients: dict[str, list[Tensor]] = {key: [] for key in start}
    for seed in range(3):
        model.fill_gradients(seed)
        for key, parameter in model.named_parameters():
            gradients[key].append(parameter.grad.clone())
        optimizer.step()
    for key, parameter in model.named_parameters():
        if name == "muon" and key == "experts":
            want = torch.stack(
                [muon_by_hand(start[key][e], [g[e] for g in gradients[key]], lr, decay) for e in range(3)]
            )
        elif name == "muon" and key == "block.wide.weight":
            want = muon_by_hand(start[key], gradients[key], lr, decay)
        else:
            adam = AdamWByHand(start[key], lr, 0.0 if key == "norm.weight" else decay)
            for gradient in gradients[key]:
                adam.step(gradient)
            want = adam.value
        torch.testing.assert_close(parameter.double(), want, atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_muon_leaves_out_parameters_without_a_gradient() -> None:
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Muon(
        [{"params": [first, second], "muon": True, "lr": 0.1}],
        MuonConfig(weight_decay=0.5, newton_schulz_precision="fp32"),
    )
    second.grad = torch.eye(2)
    optimizer.step()
    assert torch.equal(first, torch.ones(2, 2)) and not torch.equal(second, torch.ones(2, 2))


def test_matrices_of_one_shape_go_in_batches_of_bounded_size() -> None:
    """Order is kept within a shape, stacks that are too large are split, and nothing is left out or taken twice."""
    shapes = [(3, 4), (2, 5), (5, 3, 4), (3, 4), (2, 5), (1, 3, 4)]
    stacks = [Matrices(*(torch.full(shape, float(i)).view(-1, *shape[-2:]),) * 3) for i, shape in enumerate(shapes)]
    found = [[(len(m.weight), int(m.weight[0, 0, 0])) for m in batch] for batch in batches(stacks, 36)]
    assert found == [[(1, 0)], [(3, 2)], [(2, 2), (1, 3)], [(1, 5)], [(1, 1), (1, 4)]]
    assert [[len(m.weight) for m in batch] for batch in batches(stacks[:2], 1)] == [[1], [1]]


def test_batches_change_no_update(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(6, 4), (4, 6), (6, 4), (5, 6, 4), (2, 3, 6, 4)]
    results = []
    for values in (2**27, 50, 1):
        monkeypatch.setattr(optimizer_module, "BATCH_VALUES", values)
        generator = torch.Generator().manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        optimizer = Muon([{"params": parameters, "muon": True, "lr": 0.1}], MuonConfig(newton_schulz_precision="fp32"))
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-5)


def test_muon_updates_have_adamws_size() -> None:
    """Moonlight: 0.2 · √max(M, N) gives entries of root mean square near 0.2, whatever the shape."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([{"params": [parameter], "muon": True, "lr": 1.0}], MuonConfig(weight_decay=0.0)).step()
        assert 0.12 < parameter.square().mean().sqrt().item() < 0.25


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_update_is_near_orthogonal_in_either_precision(precision: Literal["fp32", "bf16"]) -> None:
    """bf16 is enough to come near; momentum and parameter stay in float32 all the same."""
    parameter = nn.Parameter(torch.zeros(24, 40))
    parameter.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    config = MuonConfig(weight_decay=0.0, newton_schulz_precision=precision)
    optimizer = Muon([{"params": [parameter], "muon": True, "lr": 1.0}], config)
    optimizer.step()
    singular = torch.linalg.svdvals(parameter.detach()) / (0.2 * math.sqrt(40))
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert {tensor.dtype for tensor in (parameter, *optimizer.state[parameter].values())} == {torch.float32}
    kept = torch.nn.functional.cosine_similarity(-parameter.detach().flatten(), parameter.grad.flatten(), dim=0)
    assert kept > 0.9
