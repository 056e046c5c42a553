"""Optimizers: which parameter is in which group, and each update against one written out."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from deepwright_core.registry import Registry
from deepwright_core.training.optimizer import Muon, MuonConfig, orthogonalise


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


@pytest.mark.parametrize("shape", [(8, 8), (4, 16), (16, 4), (1, 5)])
def test_orthogonalised_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    """Near as the published coefficients come: between 0.7 and 1.2, whatever the spread was; directions are kept."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    spread = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    result = orthogonalise(u @ spread.diag() @ vh * 300, 5)
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.65 and singular.max() < 1.25
    mixed = u.T @ result @ vh.T
    torch.testing.assert_close(mixed, mixed.diagonal().diag(), atol=1e-9, rtol=0)
    assert (mixed.diagonal() > 0).all()


def test_a_stack_of_matrices_is_a_batch() -> None:
    torch.manual_seed(0)
    stack = torch.randn(4, 6, 3) * torch.tensor([1.0, 10.0, 0.1, 100.0])[:, None, None]
    want = torch.stack([orthogonalise(matrix, 5) for matrix in stack])
    torch.testing.assert_close(orthogonalise(stack, 5), want)


def test_a_zero_gradient_is_no_update_and_no_nan() -> None:
    assert torch.equal(orthogonalise(torch.zeros(2, 3, 4), 5), torch.zeros(2, 3, 4))


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
