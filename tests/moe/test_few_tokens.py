"""A mixture in few calls: what the mixture itself gives, for each kind of router; and where it has no such form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import initialise
from deepwright_core.registry import Registry
from deepwright_moe import few_tokens
from deepwright_moe.mixture import MixtureOfExperts

HIDDEN = 12
ROUTERS: dict[str, dict[str, Any]] = {
    "sigmoid": {"name": "noaux_tc"},
    "groups": {"name": "noaux_tc", "groups": 4, "top_groups": 2, "scaling": 2.5},
    "not normalised": {"name": "noaux_tc", "scoring": "softmax", "normalise": False},
    "softmax": {"name": "group_limited_greedy", "groups": 2, "top_groups": 1, "scaling": 16.0},
}


def build(registry: Registry, **options: Any) -> MixtureOfExperts:
    ffn = {"name": "moe", "experts": 8, "top_k": 3, "intermediate_size": 5, "shared_experts": 2, **options}
    model = ModelConfig(hidden_size=HIDDEN, layers=1, intermediate_size=4, attention={"name": "gqa"}, ffn=ffn)
    mixture = registry.build("ffn", ffn, model, 0)
    initialise(mixture, 0.5, torch.Generator().manual_seed(0))
    if hasattr(mixture.router, "bias_E"):
        mixture.router.bias_E.copy_(torch.linspace(-0.3, 0.3, 8))
    return mixture


@torch.no_grad()
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS.keys())
def test_it_gives_what_the_mixture_gives(registry: Registry, router: dict[str, Any], shared: int) -> None:
    mixture = build(registry, router=router, shared_experts=shared)
    form = mixture.few_rows_form()
    assert form is not None
    x_TD = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(1))
    x_TD[3] = 0  # every expert scores the same
    torch.testing.assert_close(form(x_TD), mixture(x_TD[None], None)[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_too_many_products_are_the_mixtures_own(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = build(registry)
    form, x_TD = mixture.few_rows_form(), torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert form is not None
    asked: list[int] = []
    mixture.router.register_forward_hook(lambda _, args, __: asked.append(len(args[0])))
    form(x_TD)
    assert asked == []
    monkeypatch.setattr(few_tokens, "MOST_PRODUCTS", 1000)
    assert torch.equal(form(x_TD), mixture(x_TD[:, None], None)[:, 0])
    assert asked == [4, 4]


def test_corrections_and_large_stacks_have_no_such_form(registry: Registry) -> None:
    mixture = build(registry)
    mixture.experts.corrections["down_EDI"] = None  # type: ignore[assignment]
    assert mixture.few_rows_form() is None
    assert build(registry, intermediate_size=4096).few_rows_form() is None
