"""The published formats of DeepSeek-V3 (also R1, Moonlight, Kimi K2) and DeepSeek-V2.

They share names and differ in the router: V3's has a sigmoid and a balancing bias (`noaux_tc`), V2's a softmax and no
bias. Both keep rotary values in interleaved pairs, as we do, so no row changes its place.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..model.config import ModelConfig
from ..registry import Registry
from .fields import Fields
from .format import FormatConfig
from .piece import Piece, Shape, check_places, stacked
from .rope_fields import read_rope, write_rope

# Ours to theirs, inside a block. The second value: does an FP8 checkpoint store it in blocks?
BLOCK = {
    "attention_norm.weight": ("input_layernorm.weight", False),
    "attention.q.weight": ("self_attn.q_proj.weight", True),
    "attention.q_a.weight": ("self_attn.q_a_proj.weight", True),
    "attention.q_norm.weight": ("self_attn.q_a_layernorm.weight", False),
    "attention.q_b.weight": ("self_attn.q_b_proj.weight", True),
    "attention.kv_a.weight": ("self_attn.kv_a_proj_with_mqa.weight", True),
    "attention.kv_norm.weight": ("self_attn.kv_a_layernorm.weight", False),
    "attention.kv_b.weight": ("self_attn.kv_b_proj.weight", True),
    "attention.o.weight": ("self_attn.o_proj.weight", True),
    "ffn_norm.weight": ("post_attention_layernorm.weight", False),
    "ffn.gate.weight": ("mlp.gate_proj.weight", True),
    "ffn.up.weight": ("mlp.up_proj.weight", True),
    "ffn.down.weight": ("mlp.down_proj.weight", True),
    "ffn.router.weight": ("mlp.gate.weight", False),
    "ffn.shared.gate.weight": ("mlp.shared_experts.gate_proj.weight", True),
    "ffn.shared.up.weight": ("mlp.shared_experts.up_proj.weight", True),
    "ffn.shared.down.weight": ("mlp.shared_experts.down_proj.weight", True),
}
ROUTER_BIAS = ("ffn.router.bias_E", "mlp.gate.e_score_correction_bias")
GATE_UP, DOWN = "ffn.experts.gate_up_EID", "ffn.experts.down_EDI"
MTP = {
    "embedding_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "projection.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
MOST_EXPERTS = 8192  # of a layer: each is three tensors to look for
LATENT_NORM_EPS = 1e-6  # the published modelling code's, whatever rms_norm_eps says


class DeepSeek(ABC):
    """What the two formats have in common: all but the router."""

    name: str
    model_types: tuple[str, ...]
    architecture: str

    @abstractmethod
    def read_router(self, fields: Fields) -> dict[str, Any]:
        """Our `router` section."""

    @abstractmethod
    def write_router(self, router: Any) -> dict[str, Any]:
        """The router's fields of a published config."""

    @abstractmethod
    def router_refusals(self, router: Any) -> list[str]:
        """Why a router cannot be written in this format, a sentence each."""

    # Configs --------------------------------------------------------------------------------------

    def read(self, fields: Fields) -> dict[str, Any]:
        heads = fields.size("num_attention_heads")
        fields.only("num_key_value_heads", (heads,), heads)
        fields.only("hidden_act", ("silu",), "silu")
        fields.only("attention_bias", (False,), False)
        fields.only("mlp_bias", (False,), False)
        fields.only("moe_layer_freq", (1,), 1)
        fields.only("rope_interleave", (True,), True)
        return {
            "vocab_size": fields.size("vocab_size"),
            "hidden_size": fields.size("hidden_size"),
            "layers": fields.size("num_hidden_layers"),
            "intermediate_size": fields.size("intermediate_size"),
            "first_dense_layers": fields.size("first_k_dense_replace", 0, least=0),
            "max_positions": fields.size("max_position_embeddings"),
            "norm_eps": fields.number("rms_norm_eps", 1e-6),
            "tied_head": fields.flag("tie_word_embeddings", False),
            "init_std": fields.number("initializer_range", 0.02),
            "rope": read_rope(fields),
            "mtp": {"depth": fields.size("num_nextn_predict_layers", 0, least=0)},
            "attention": {
                "name": "mla",
                "heads": heads,
                "q_lora_rank": fields.size("q_lora_rank", 0, least=0),
                "kv_lora_rank": fields.size("kv_lora_rank"),
                "qk_nope_head_dim": fields.size("qk_nope_head_dim"),
                "qk_rope_head_dim": fields.size("qk_rope_head_dim"),
                "v_head_dim": fields.size("v_head_dim"),
                "latent_norm_eps": LATENT_NORM_EPS,
            },
            "ffn": {
                "name": "moe",
                "experts": fields.size("n_routed_experts", most=MOST_EXPERTS),
                "top_k": fields.size("num_experts_per_tok"),
                "shared_experts": fields.size("n_shared_experts", 0, least=0),
                "intermediate_size": fields.size("moe_intermediate_size"),
                "balance_loss": fields.number("aux_loss_alpha", 1e-4),
                "router": self.read_router(fields),
            },
        }

    def refusals(self, config: ModelConfig, registry: Registry) -> list[str]:
        attention, ffn = config.attention.get("name"), config.ffn.get("name")
        reasons = []
        if attention != "mla":
            reasons.append(f"model.attention.name is {attention}, expected mla")
        elif (eps := registry.parse("attention", config.attention).latent_norm_eps) != LATENT_NORM_EPS:
            reasons.append(f"model.attention.latent_norm_eps is {eps}; its readers take {LATENT_NORM_EPS}")
        if ffn != "moe":
            return [*reasons, f"model.ffn.name is {ffn}, expected moe"]
        return reasons + self.router_refusals(registry.parse("ffn", config.ffn).router)

    def write(self, config: ModelConfig, registry: Registry) -> dict[str, Any]:
        attention = registry.parse("attention", config.attention)
        ffn = registry.parse("ffn", config.ffn)
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "moe_intermediate_size": ffn.intermediate_size,
            "num_hidden_layers": config.layers,
            "num_nextn_predict_layers": config.mtp.depth,
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.heads,
            "n_shared_experts": ffn.shared_experts,
            "n_routed_experts": ffn.experts,
            "num_experts_per_tok": ffn.top_k,
            "moe_layer_freq": 1,
            "first_k_dense_replace": config.first_dense_layers,
            "aux_loss_alpha": ffn.balance_loss,
            "seq_aux": True,
            **self.write_router(ffn.router),
            "q_lora_rank": attention.q_lora_rank or None,
            "kv_lora_rank": attention.kv_lora_rank,
            "qk_nope_head_dim": attention.qk_nope_head_dim,
            "qk_rope_head_dim": attention.qk_rope_head_dim,
            "v_head_dim": attention.v_head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tied_head,
            "rope_interleave": True,
            **write_rope(config.rope),
        }

    def caveats(self, config: ModelConfig, registry: Registry, tokenizer: Mapping[str, Any]) -> list[str]:
        if registry.parse("ffn", config.ffn).shared_experts:
            return []
        # SGLang has no place for matrices of width 0, llama.cpp and vLLM's products on a CPU stop at them.
        return [
            "model.ffn.shared_experts is 0: transformers loads that; "
            "SGLang, llama.cpp and vLLM on a CPU want at least one shared expert in this architecture."
        ]

    # Tensors --------------------------------------------------------------------------------------

    def pieces(self, config: ModelConfig, shapes: Mapping[str, Shape]) -> list[Piece]:
        pieces = [
            Piece("model.embed_tokens.weight", "embedding.weight", shapes["embedding.weight"]),
            Piece("model.norm.weight", "norm.weight", shapes["norm.weight"]),
            _head("lm_head.weight", config, shapes),
        ]
        for layer in range(config.layers):
            pieces += _block(f"layers.{layer}.", f"model.layers.{layer}.", shapes)
        for depth in range(config.mtp.depth):
            ours, theirs = f"mtp.{depth}.", f"model.layers.{config.layers + depth}."
            pieces += _block(f"{ours}block.", theirs, shapes)
            pieces += [Piece(theirs + name, ours + own, shapes[ours + own]) for own, name in MTP.items()]
            pieces.append(Piece(f"{theirs}embed_tokens.weight", "embedding.weight", _vocabulary(shapes), copy=True))
            head = "embedding.weight" if config.tied_head else "head.weight"
            pieces.append(Piece(f"{theirs}shared_head.head.weight", head, _vocabulary(shapes), copy=True))
        check_places(shapes, pieces, self.name)
        return pieces

    def mtp_prefixes(self, layers: int, depth: int) -> tuple[str, ...]:
        return tuple(f"model.layers.{layers + k}." for k in range(depth))


def _vocabulary(shapes: Mapping[str, Shape]) -> Shape:
    return shapes["embedding.weight"]


def _head(theirs: str, config: ModelConfig, shapes: Mapping[str, Shape]) -> Piece:
    """The output head; a tied one repeats the embedding, and is written: vLLM does not tie the two in this
    architecture, and would answer with whatever its memory held."""
    ours = "embedding.weight" if config.tied_head else "head.weight"
    return Piece(theirs, ours, _vocabulary(shapes), copy=config.tied_head)


def _block(ours: str, theirs: str, shapes: Mapping[str, Shape]) -> Iterator[Piece]:
    for own, (name, quantised) in BLOCK.items():
        if ours + own in shapes:
            yield Piece(theirs + name, ours + own, shapes[ours + own], quantised=quantised)
    bias, its_name = ROUTER_BIAS
    if ours + bias in shapes:
        # Always float32: in bfloat16 the bias's small steps are lost.
        yield Piece(theirs + its_name, ours + bias, shapes[ours + bias], dtype=torch.float32)
    if ours + GATE_UP not in shapes:
        return
    experts, both, hidden = shapes[ours + GATE_UP]
    width = both // 2
    for expert in range(experts):
        inside = f"{theirs}mlp.experts.{expert}."
        gate_up, down = shapes[ours + GATE_UP], shapes[ours + DOWN]
        yield stacked(f"{inside}gate_proj.weight", ours + GATE_UP, gate_up, expert, 0, width)
        yield stacked(f"{inside}up_proj.weight", ours + GATE_UP, gate_up, expert, width, both)
        yield stacked(f"{inside}down_proj.weight", ours + DOWN, down, expert, 0, hidden)
    if f"{ours}ffn.shared.gate.weight" not in shapes:
        # Readers that always have a shared expert keep one of width 0.
        for name, shape in (("gate", (0, hidden)), ("up", (0, hidden)), ("down", (hidden, 0))):
            nothing = (0, slice(0, 0))
            yield Piece(f"{theirs}mlp.shared_experts.{name}_proj.weight", ours + GATE_UP, shape, nothing)


class DeepSeekV3(DeepSeek):
    """DeepSeek-V3 and R1; Moonlight and Kimi K2 are the same in other sizes."""

    name = "deepseek_v3"
    model_types = ("deepseek_v3", "kimi_k2")
    architecture = "DeepseekV3ForCausalLM"

    def read_router(self, fields: Fields) -> dict[str, Any]:
        fields.only("topk_method", ("noaux_tc",), "noaux_tc")
        return {
            "name": "noaux_tc",
            "scoring": fields.only("scoring_func", ("sigmoid", "softmax"), "sigmoid"),
            "groups": fields.size("n_group", 1),
            "top_groups": fields.size("topk_group", 1),
            "normalise": fields.flag("norm_topk_prob", True),
            "scaling": fields.number("routed_scaling_factor", 1.0),
        }

    def router_refusals(self, router: Any) -> list[str]:
        if router["name"] != "noaux_tc":
            return [f"model.ffn.router.name is {router['name']}, expected noaux_tc"]
        if router["scoring"] != "sigmoid":
            return [f"model.ffn.router.scoring is {router['scoring']}; some of its readers know sigmoid alone"]
        return []

    def write_router(self, router: Any) -> dict[str, Any]:
        return {
            "scoring_func": router["scoring"],
            "topk_method": "noaux_tc",
            "n_group": router["groups"],
            "topk_group": router["top_groups"],
            "norm_topk_prob": router["normalise"],
            "routed_scaling_factor": router["scaling"],
        }


class DeepSeekV2(DeepSeek):
    """DeepSeek-V2 and V2-Lite."""

    name = "deepseek_v2"
    model_types = ("deepseek_v2",)
    architecture = "DeepseekV2ForCausalLM"

    def read_router(self, fields: Fields) -> dict[str, Any]:
        fields.only("scoring_func", ("softmax",), "softmax")
        # Readers disagree whether normalised weights are scaled as well, so neither reading would be right.
        fields.only("norm_topk_prob", (False,), False)
        method = fields.only("topk_method", ("greedy", "group_limited_greedy"), "greedy")
        groups, top_groups = fields.size("n_group", 1), fields.size("topk_group", 1)
        limited = method == "group_limited_greedy"
        return {
            "name": "group_limited_greedy",
            "groups": groups if limited else 1,
            "top_groups": top_groups if limited else 1,
            "scaling": fields.number("routed_scaling_factor", 1.0),
        }

    def router_refusals(self, router: Any) -> list[str]:
        if router["name"] != "group_limited_greedy":
            return [f"model.ffn.router.name is {router['name']}, expected group_limited_greedy"]
        if router["normalise"]:
            return ["model.ffn.router.normalise is true; its readers disagree about what that means"]
        return []

    def refusals(self, config: ModelConfig, registry: Registry) -> list[str]:
        reasons = super().refusals(config, registry)
        if config.mtp.depth:
            reasons.append(f"model.mtp.depth is {config.mtp.depth}, expected 0 (it can be left out)")
        return reasons

    def write_router(self, router: Any) -> dict[str, Any]:
        return {
            "scoring_func": "softmax",
            "topk_method": "group_limited_greedy" if router["groups"] > 1 else "greedy",
            "n_group": router["groups"],
            "topk_group": router["top_groups"],
            "norm_topk_prob": False,
            "routed_scaling_factor": router["scaling"],
        }


def build_deepseek_v3(config: FormatConfig) -> DeepSeekV3:
    """DeepSeek-V3's checkpoints (also R1, Moonlight, Kimi K2)."""
    return DeepSeekV3()


def build_deepseek_v2(config: FormatConfig) -> DeepSeekV2:
    """DeepSeek-V2's checkpoints (also V2-Lite)."""
    return DeepSeekV2()


def register(registry: Registry) -> None:
    registry.add("checkpoint_format", "deepseek_v3", config=FormatConfig)(build_deepseek_v3)
    registry.add("checkpoint_format", "deepseek_v2", config=FormatConfig)(build_deepseek_v2)
