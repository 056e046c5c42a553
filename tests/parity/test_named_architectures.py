"""Every named architecture against code that we did not write: transformers builds the published config.json on the
meta device, and both count the same parameters; our reader of config.json makes the same model of it as conf/model.

The values of the configs were typed from the published files, and not taken from conf/.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from deepwright_core.huggingface.fields import Fields
from deepwright_core.huggingface.format import format_of
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.cost import Cost, estimate
from deepwright_core.plugins import Plugins, installed
from deepwright_core.registry import parse
from flows import compose

transformers = pytest.importorskip("transformers")

LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
COMMON = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "tie_word_embeddings": False,
    **LATENT,
}
YARN = {"type": "yarn", "beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096}
V2_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
SIGMOID = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
SOFTMAX = {"scoring_func": "softmax", "norm_topk_prob": False}
PUBLISHED: dict[str, dict[str, Any]] = {
    "v2_lite": {
        **COMMON,
        **SOFTMAX,
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": V2_YARN,
    },
    "v2": {
        **COMMON,
        **SOFTMAX,
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "first_k_dense_replace": 1,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": V2_YARN,
    },
    "v3": {
        **COMMON,
        **SIGMOID,
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "first_k_dense_replace": 3,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "moonlight_16b_a3b": {
        **COMMON,
        **SIGMOID,
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": None,
        "first_k_dense_replace": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.446,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
    },
    "kimi_k2": {
        **COMMON,
        **SIGMOID,
        "model_type": "kimi_k2",
        "vocab_size": 163840,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "first_k_dense_replace": 1,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": {
            "type": "yarn",
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
    },
    "llama3_405b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "qwen2_5_72b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
}
CLASSES = {"deepseek_v2": "DeepseekV2", "llama": "Llama", "qwen2": "Qwen2"}
# What the model cards and reports say, in billions: all, and for one token (None: not said).
SAID = {
    "v2_lite": (15.7, 2.66),  # said to be 2.4, without the embedding
    "v2": (235.74, 21.4),
    "v3": (671.026, 37.55),
    "moonlight_16b_a3b": (15.96, 2.91),  # said to be 2.24 without embedding and head
    "kimi_k2": (1026.4, 32.86),
    "llama3_405b": (405.85, 405.85),
    "qwen2_5_72b": (72.71, 72.71),
}
VOCABULARY = 16384  # for models that take the tokenizer's
NAMES = pytest.mark.parametrize("name", PUBLISHED)


@functools.cache
def plugins() -> Plugins:
    return installed()


@functools.cache
def config_of(name: str) -> ModelConfig:
    """An option of conf/model, as `model=NAME` chooses it."""
    section = compose.compose([f"model={name}"], plugins())["model"]
    return parse(ModelConfig, section, "model", plugins().registry)


@functools.cache
def cost_of(name: str) -> Cost:
    config = config_of(name)
    return estimate(plugins().registry, config.model_copy(update={"vocab_size": config.vocab_size or VOCABULARY}))


def their_parameters(document: dict[str, Any]) -> int:
    """Parameters of transformers' class for a config.json; it leaves multi-token prediction out."""
    kind = CLASSES.get(document["model_type"], "DeepseekV3")
    values = {key: value for key, value in document.items() if key not in ("model_type", "num_nextn_predict_layers")}
    config = getattr(transformers, f"{kind}Config")(**values)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return sum(parameter.numel() for parameter in model.parameters())


@NAMES
def test_as_many_parameters_as_transformers_builds(name: str) -> None:
    assert cost_of(name).parameters_total == their_parameters(PUBLISHED[name])


@NAMES
def test_the_published_totals(name: str) -> None:
    total, active = SAID[name]
    assert cost_of(name).parameters_total / 1e9 == pytest.approx(total, rel=1e-3)
    assert cost_of(name).parameters_active / 1e9 == pytest.approx(active, rel=3e-3)


@NAMES
def test_the_published_config_means_the_same_model(name: str) -> None:
    """Key by key, but for what only training reads: there the reports say more than config.json."""
    document = PUBLISHED[name]
    fields = Fields(document, "config.json")
    section = format_of(document["model_type"], plugins().registry, "config.json").read(fields)
    assert fields.problems == []
    read = parse(ModelConfig, section, "config.json", plugins().registry)
    assert without_training(read) == without_training(config_of(name))


def without_training(config: ModelConfig) -> dict[str, Any]:
    values = config.model_dump(exclude={"init_std": True, "mtp": {"loss_weight"}})
    values["ffn"].pop("balance_loss", None)
    values["ffn"].get("router", {}).pop("bias_update_speed", None)
    return values


def test_moonlight_and_qwen_without_their_tables() -> None:
    """Their cards count without embedding and head: 2.24 B for a token, and 70 B."""
    moonlight, qwen = cost_of("moonlight_16b_a3b"), cost_of("qwen2_5_72b")
    tables = 2 * 163840 * 2048
    assert (moonlight.parameters_active - tables) / 1e9 == pytest.approx(2.24, abs=5e-3)
    assert (qwen.parameters_total - 2 * 152064 * 8192) / 1e9 == pytest.approx(70.2, abs=0.05)


@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_our_own_small_ones_have_the_traits_of_v3(name: str) -> None:
    config = config_of(name)
    assert (
        config.attention["name"] == "mla" and config.ffn["name"] == "moe" and config.ffn["router"]["name"] == "noaux_tc"
    )
    assert config.ffn["shared_experts"] >= 1 and 0 < config.first_dense_layers < config.layers and config.mtp.depth == 1


def test_mini_lies_between_tiny_and_v2_lite() -> None:
    config = config_of("mini")
    assert config.attention["q_lora_rank"] > 0 and config.ffn["router"]["groups"] > 1
    assert 1e8 < cost_of("mini").parameters_total + cost_of("mini").parameters_mtp < 2e8
