"""A model small enough to take apart, with a stack of experts of core's own making in it, and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor, nn

from deepwright_core import plugin
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import Transformer, build_model
from deepwright_core.registry import ComponentConfig, Registry, parse
from deepwright_core.tokenizer import Tokenizer

VOCABULARY = 24


class Stack(nn.Module):
    """Three linear experts whose mean everyone gets, in one parameter; a stranger's feed-forward."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.weight_EDD = nn.Parameter(torch.empty(3, hidden_size, hidden_size))

    def forward(self, x_BSD: Tensor, record: Any = None) -> Tensor:
        return torch.einsum("bsd,efd->bsf", x_BSD, self.experts.weight_EDD).tanh()


@pytest.fixture(scope="session")
def registry() -> Registry:
    registry = Registry()
    plugin.deepwright_register(registry)
    registry.add("ffn", "stack", config=ComponentConfig)(lambda config, model, layer: Stack(model.hidden_size))
    return registry


Build = Callable[..., Transformer]


@pytest.fixture
def build(registry: Registry) -> Build:
    """`build(tied_head=True)`: a model with a dense first layer, a stack, and a module that predicts further."""

    def make(**changes: Any) -> Transformer:
        values = {
            "vocab_size": VOCABULARY,
            "hidden_size": 8,
            "layers": 2,
            "intermediate_size": 12,
            "first_dense_layers": 1,
            "max_positions": 32,
            "init_std": 0.3,
            "mtp": {"depth": 1},
            "attention": {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4},
            "ffn": {"name": "stack"},
            **changes,
        }
        return build_model(registry, parse(ModelConfig, values, "model", registry), seed=0)

    return make


@pytest.fixture(scope="session")
def tokenizer(registry: Registry) -> Tokenizer:
    text = ["State the final answer: 357 + 468 =", "The quick brown fox jumps over the lazy dog."] * 4
    made: Tokenizer = registry.build("tokenizer", {"name": "bpe", "vocab_size": 280}, text)
    return made


@pytest.fixture
def bare(build: Build, tmp_path: Path) -> Path:
    """A model directory whose tokenizer has never heard of chat."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["The quick brown fox"] * 4,
        tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]),
    )
    save_model(build(vocab_size=bpe.get_vocab_size()), tmp_path / "bare")
    bpe.save(str(tmp_path / "bare" / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(names))
    return tmp_path / "bare"


@pytest.fixture
def base(build: Build, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model directory."""
    save_model(build(vocab_size=tokenizer.vocab_size), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    return tmp_path / "base"
