"""The published formats of Llama and Qwen2: dense models with grouped-query attention, as distilled students are.

They keep the rotary values of each head as two halves; ours are pairs, so rows of q and k change their places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..model.config import ModelConfig
from ..registry import Registry
from .fields import Fields
from .format import FormatConfig
from .piece import HalvesToPairs, Piece, Shape, check_places
from .rope_fields import read_rope, write_rope

# Ours to theirs, inside a block. The second value: does an FP8 checkpoint store it in blocks?
BLOCK = {
    "attention_norm.weight": ("input_layernorm.weight", False),
    "attention.q.weight": ("self_attn.q_proj.weight", True),
    "attention.k.weight": ("self_attn.k_proj.weight", True),
    "attention.v.weight": ("self_attn.v_proj.weight", True),
    "attention.q.bias": ("self_attn.q_proj.bias", False),
    "attention.k.bias": ("self_attn.k_proj.bias", False),
    "attention.v.bias": ("self_attn.v_proj.bias", False),
    "attention.o.weight": ("self_attn.o_proj.weight", True),
    "ffn_norm.weight": ("post_attention_layernorm.weight", False),
    "ffn.gate.weight": ("mlp.gate_proj.weight", True),
    "ffn.up.weight": ("mlp.up_proj.weight", True),
    "ffn.down.weight": ("mlp.down_proj.weight", True),
}
# How Qwen2's tokenizer cuts text before it looks for tokens; it normalises to NFC before that.
QWEN2_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ROTATED = ("attention.q.", "attention.k.")


class Llama:
    """Llama 2 and 3: no biases."""

    name = "llama"
    model_types: tuple[str, ...] = ("llama",)
    architecture = "LlamaForCausalLM"
    qkv_bias = False

    def read(self, fields: Fields) -> dict[str, Any]:
        heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
        fields.only("hidden_act", ("silu",), "silu")
        self._read_bias(fields)
        fields.only("mlp_bias", (False,), False)
        return {
            "vocab_size": fields.size("vocab_size"),
            "hidden_size": hidden,
            "layers": fields.size("num_hidden_layers"),
            "intermediate_size": fields.size("intermediate_size"),
            "max_positions": fields.size("max_position_embeddings"),
            "norm_eps": fields.number("rms_norm_eps", 1e-6),
            "tied_head": fields.flag("tie_word_embeddings", False),
            "init_std": fields.number("initializer_range", 0.02),
            "rope": read_rope(fields),
            "attention": {
                "name": "gqa",
                "heads": heads,
                "kv_heads": fields.size("num_key_value_heads", heads),
                "head_dim": fields.size("head_dim", max(hidden // heads, 1)),
                "qkv_bias": self.qkv_bias,
            },
            "ffn": {"name": "dense"},
        }

    def _read_bias(self, fields: Fields) -> None:
        fields.only("attention_bias", (False,), False)

    def refusals(self, config: ModelConfig, registry: Registry) -> list[str]:
        reasons = []
        if config.attention.get("name") != "gqa":
            reasons.append(f"model.attention.name is {config.attention.get('name')}, expected gqa")
        elif registry.parse("attention", config.attention).qkv_bias != self.qkv_bias:
            reasons.append(f"model.attention.qkv_bias is {not self.qkv_bias}, expected {self.qkv_bias}")
        if config.ffn.get("name") != "dense":
            reasons.append(f"model.ffn.name is {config.ffn.get('name')}, expected dense")
        elif config.first_dense_layers and registry.parse("ffn", config.ffn).intermediate_size not in (
            0,
            config.intermediate_size,
        ):
            reasons.append("model.first_dense_layers have another width than the layers after them")
        if config.mtp.depth:
            reasons.append(f"model.mtp.depth is {config.mtp.depth}, expected 0 (it can be left out)")
        yarn = config.rope.yarn
        if yarn is not None and (yarn.mscale, yarn.mscale_all_dim) != (1.0, 0.0):
            reasons.append("model.rope.yarn has DeepSeek's mscale; expected mscale 1 and mscale_all_dim 0")
        return reasons

    def write(self, config: ModelConfig, registry: Registry) -> dict[str, Any]:
        attention = registry.parse("attention", config.attention)
        return {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": registry.parse("ffn", config.ffn).intermediate_size or config.intermediate_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "hidden_act": "silu",
            **self._write_bias(),
            "attention_dropout": 0.0,
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps,
            "initializer_range": config.init_std,
            "tie_word_embeddings": config.tied_head,
            **write_rope(config.rope),
        }

    def _write_bias(self) -> dict[str, Any]:
        return {"attention_bias": False, "mlp_bias": False}

    def caveats(self, config: ModelConfig, registry: Registry, tokenizer: Mapping[str, Any]) -> list[str]:
        return []

    def pieces(self, config: ModelConfig, shapes: Mapping[str, Shape]) -> list[Piece]:
        order = HalvesToPairs(config.attention["head_dim"])
        head = "embedding.weight" if config.tied_head else "head.weight"
        tied = config.tied_head
        pieces = [
            Piece("model.embed_tokens.weight", "embedding.weight", shapes["embedding.weight"]),
            Piece("model.norm.weight", "norm.weight", shapes["norm.weight"]),
            Piece("lm_head.weight", head, shapes["embedding.weight"], copy=tied, written=not tied),
        ]
        for layer in range(config.layers):
            for own, (name, quantised) in BLOCK.items():
                ours = f"layers.{layer}.{own}"
                if ours in shapes:
                    turned = order if own.startswith(ROTATED) else None
                    theirs = f"model.layers.{layer}.{name}"
                    pieces.append(Piece(theirs, ours, shapes[ours], order=turned, quantised=quantised))
        check_places(shapes, pieces, self.name)
        return pieces

    def mtp_prefixes(self, layers: int, depth: int) -> tuple[str, ...]:
        return ()


class Qwen2(Llama):
    """Qwen2 and Qwen2.5: biases on q, k and v."""

    name = "qwen2"
    model_types = ("qwen2",)
    architecture = "Qwen2ForCausalLM"
    qkv_bias = True

    def _read_bias(self, fields: Fields) -> None:
        fields.only("use_sliding_window", (False,), False)
        for unused in ("sliding_window", "max_window_layers", "layer_types"):  # they tell of the windows that are off
            fields.value(unused, None)

    def _write_bias(self) -> dict[str, Any]:
        return {"use_sliding_window": False}

    def caveats(self, config: ModelConfig, registry: Registry, tokenizer: Mapping[str, Any]) -> list[str]:
        cut, normalizer = json.dumps(tokenizer.get("pre_tokenizer")), tokenizer.get("normalizer")
        if not tokenizer or (json.dumps(QWEN2_CUT) in cut and normalizer == {"type": "NFC"}):
            return []
        # It keeps the vocabulary and the merges, and puts Qwen2's own cut and "<|endoftext|>" in.
        return [
            "AutoTokenizer of transformers 5 takes every tokenizer beside a qwen2 model for Qwen2's, and this one cuts "
            'text in another way: other ids come out. PreTrainedTokenizerFast.from_pretrained("...") reads it right.'
        ]


def build_llama(config: FormatConfig) -> Llama:
    """Llama's checkpoints."""
    return Llama()


def build_qwen2(config: FormatConfig) -> Qwen2:
    """Qwen2's and Qwen2.5's checkpoints."""
    return Qwen2()


def register(registry: Registry) -> None:
    registry.add("checkpoint_format", "llama", config=FormatConfig)(build_llama)
    registry.add("checkpoint_format", "qwen2", config=FormatConfig)(build_qwen2)
