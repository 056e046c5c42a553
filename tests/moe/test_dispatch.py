"""Experts on several ranks give what they give on one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.transformer import build_model
from deepwright_core.parallel.experts import spread_experts
from deepwright_core.parallel.ranks import Ranks
from deepwright_core.registry import Registry, parse


class Kept(Ranks):
    """A rank that keeps what it would add up with the others."""

    def add_up(self, x: Tensor) -> Tensor:
        KEPT.append(x.clone())
        return x


KEPT: list[Tensor] = []


def values(experts: int = 6) -> dict[str, Any]:
    return {
        "vocab_size": 16,
        "hidden_size": 12,
        "layers": 2,
        "intermediate_size": 16,
        "first_dense_layers": 1,
        "max_positions": 16,
        "init_std": 0.3,
        "attention": {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 8},
        "ffn": {"name": "moe", "experts": experts, "top_k": 3, "intermediate_size": 8, "shared_experts": 0},
    }


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 23])
def test_the_ranks_results_add_up_to_the_whole(registry: Registry, world: int, tokens: int) -> None:
    whole: Any = build_model(registry, parse(ModelConfig, values(), "model", registry), seed=0).eval()
    x_BSD = torch.randn(1, tokens, 12, generator=torch.Generator().manual_seed(1))
    KEPT.clear()
    with torch.inference_mode():
        want = whole.layers[1].ffn(x_BSD, None)
        for rank in range(world):
            part: Any = copy.deepcopy(whole)
            parts = spread_experts(part, Kept(rank, world, None))  # type: ignore[arg-type]
            assert set(parts) == {"layers.1.ffn.experts.gate_up_EID", "layers.1.ffn.experts.down_EDI"}
            for name, own in parts.items():
                assert own == slice(rank * 6 // world, (rank + 1) * 6 // world)
                part.get_parameter(name).copy_(whole.get_parameter(name)[own])
            part.layers[1].ffn(x_BSD, None)
    torch.testing.assert_close(torch.stack(KEPT).sum(0).view_as(want), want)
    assert len(KEPT) == world


def test_what_cannot_be_shared_out_is_refused(registry: Registry) -> None:
    model = build_model(registry, parse(ModelConfig, values(), "model", registry))
    with pytest.raises(RequestError, match=r"ffn\.experts of layer 1 are 6; expected a multiple of the 4 ranks"):
        spread_experts(model, Ranks(0, 4, None))  # type: ignore[arg-type]
    dense = {**values(), "ffn": {"name": "dense"}}
    with pytest.raises(RequestError, match="no mixture of experts"):
        spread_experts(build_model(registry, parse(ModelConfig, dense, "model", registry)), Ranks(0, 2, None))  # type: ignore[arg-type]
