"""Tables of cos and sin, bit for bit those of transformers: at position 131,072 an angle that was rounded once more
would be off by 0.015."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepwright_core.model.config import RopeConfig
from deepwright_core.model.rope import Rotary, softmax_scale

transformers = pytest.importorskip("transformers")
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale  # noqa: E402

POSITIONS = 4096
YARN = {"factor": 40.0, "original_positions": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
NAMES = {"original_positions": "original_max_position_embeddings"}
CASES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "v3": (64, 10000.0, {"yarn": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "v2": (64, 10000.0, {"yarn": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "unequal": (64, 10000.0, {"yarn": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}}),
    # A published yarn without mscales: cos and sin carry all of it.
    "qwen": (128, 1e6, {"yarn": {**YARN, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}}),
    "kimi_k2": (
        64,
        50000.0,
        {"yarn": {**YARN, "factor": 32.0, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    # Every pair turns less than once: the two ends of the ramp change their order.
    "short": (64, 10000.0, {"yarn": {**YARN, "original_positions": 4, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "moonlight": (64, 50000.0, {}),
    "llama3": (
        128,
        500000.0,
        {"llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_positions": 8192}},
    ),
}


def theirs(dim: int, theta: float, rope: dict[str, Any]) -> tuple[Any, torch.Tensor, float]:
    kind, section = next(iter(rope.items()), ("default", {}))
    parameters = {"rope_type": kind, "rope_theta": theta} | {
        NAMES.get(key, key): value for key, value in section.items()
    }
    config = transformers.LlamaConfig(
        hidden_size=dim, num_attention_heads=1, head_dim=dim, max_position_embeddings=2**17, rope_parameters=parameters
    )
    if kind == "default":
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        return config, rotary.inv_freq, rotary.attention_scaling
    return config, *ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


@pytest.mark.parametrize("case", CASES)
def test_angles_bit_for_bit(case: str) -> None:
    dim, theta, rope = CASES[case]
    _, frequencies_F, scaling = theirs(dim, theta, rope)
    table = Rotary(dim, RopeConfig(theta=theta, **rope), POSITIONS)
    angles_MF = torch.arange(POSITIONS, dtype=torch.float32)[:, None] * frequencies_F
    assert torch.equal(table.cos_MF, angles_MF.cos() * scaling)
    assert torch.equal(table.sin_MF, angles_MF.sin() * scaling)


@pytest.mark.parametrize("case", CASES)
def test_the_softmax_scale(case: str) -> None:
    dim, theta, rope = CASES[case]
    config, _, _ = theirs(dim, theta, rope)
    want = yarn_apply_mscale(config.rope_parameters, 192**-0.5)
    assert softmax_scale(192, RopeConfig(theta=theta, **rope)) == pytest.approx(want, rel=1e-15)
