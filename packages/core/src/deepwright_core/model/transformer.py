"""The model: embedding, blocks of attention and feed-forward on a residual stream, norm, head, MTP modules.

Which attention and which feed-forward is a matter of names in the config; this file never asks. Losses, parallelism
and generation live elsewhere.

Shapes: B sequences, S tokens, Q new tokens, D hidden, V vocabulary, N cache slots, W cache width.
"""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ..registry import Registry
from .attention import Attention, Rope, document_starts
from .cache import CacheBatch
from .config import ModelConfig
from .feed_forward import FeedForward, SwiGLU
from .few_rows import FewRows, few_rows_form
from .norm import RMSNorm
from .record import ForwardRecord
from .rope import Rotary


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x)). `layer` is its place, under which it reports to the record."""

    parts: ClassVar = {"attention": "attention", "ffn": "dense_ffn", "attention_norm": "norms", "ffn_norm": "norms"}

    def __init__(self, registry: Registry, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention: nn.Module = registry.build("attention", config.attention, config, layer)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn: nn.Module = (
            SwiGLU(config.hidden_size, config.intermediate_size)
            if layer < config.first_dense_layers
            else registry.build("ffn", config.ffn, config, layer)
        )

    def forward(self, x_BSD: Tensor, rope: Rope, starts_BS: Tensor | None, record: ForwardRecord | None) -> Tensor:
        attended_BSD = self.attention(self.attention_norm(x_BSD), rope, starts_BS)
        normed_BSD, x_BSD = self.ffn_norm.after_adding(attended_BSD, x_BSD)
        return x_BSD + self.ffn(normed_BSD, record)

    def extend(
        self, x_BQD: Tensor, added_BQD: Tensor | None, rope: Rope, cache_NW: Tensor, batch: CacheBatch
    ) -> tuple[Tensor, Tensor]:
        """The residual stream without what the feed-forward adds to it, and that: whoever norms next adds them up in
        passing. `added_BQD`: the same of the block before."""
        if added_BQD is None:
            normed_BQD = self.attention_norm(x_BQD)
        else:
            normed_BQD, x_BQD = self.attention_norm.after_adding(added_BQD, x_BQD)
        attended_BQD = cast(Attention, self.attention).extend(normed_BQD, rope, cache_NW, batch)
        normed_BQD, x_BQD = self.ffn_norm.after_adding(attended_BQD, x_BQD)
        return x_BQD, cast(FeedForward, self.ffn).forward(normed_BQD, None)


class MultiTokenPrediction(nn.Module):
    """One MTP module (DeepSeek-V3 report, eq. 21-23): predicts one token further from the previous depth's hidden.

    The concatenation is [embedding ; hidden], as in the published checkpoint (the report prints the other order).
    """

    def __init__(self, registry: Registry, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.projection = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(registry, config, layer)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        embedded_BSD: Tensor,
        hidden_BSD: Tensor,
        rope: Rope,
        starts_BS: Tensor | None,
        record: ForwardRecord | None,
    ) -> Tensor:
        return self.norm(self.block(self._joined(embedded_BSD, hidden_BSD), rope, starts_BS, record))

    def extend(
        self, embedded_BQD: Tensor, hidden_BQD: Tensor, rope: Rope, cache_NW: Tensor, batch: CacheBatch
    ) -> Tensor:
        x_BQD, added_BQD = self.block.extend(self._joined(embedded_BQD, hidden_BQD), None, rope, cache_NW, batch)
        return self.norm.after_adding(added_BQD, x_BQD)[0]

    def _joined(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return self.projection(torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], -1))


def _attention(block: nn.Module) -> Attention:
    return cast(Attention, block.attention)


class Transformer(nn.Module):
    """A decoder-only language model."""

    parts: ClassVar = {"embedding": "embedding", "head": "head", "norm": "norms"}

    def __init__(self, registry: Registry, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(registry, config, layer) for layer in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embedding.weight
        self.mtp = nn.ModuleList(
            MultiTokenPrediction(registry, config, config.layers + depth) for depth in range(config.mtp.depth)
        )
        self.rotary = Rotary(_attention(self.layers[0]).rope_dim, config.rope, config.max_positions)

    @property
    def max_positions(self) -> int:
        """Longest sequence the model has positions for, in tokens."""
        return self.config.max_positions

    @property
    def cache_widths(self) -> list[int]:
        """Values cached per token, layer by layer."""
        return [_attention(block).cache_width for block in self.layers]

    @property
    def fp8_cache_bytes(self) -> list[int | None]:
        """Bytes cached per token in FP8, layer by layer; None where an attention has no such cache."""
        return [getattr(_attention(block), "fp8_cache_bytes", None) for block in self.layers]

    @property
    def further_cache_widths(self) -> list[int]:
        """Values cached per token by each MTP module, when they draft."""
        return [_attention(cast(MultiTokenPrediction, module).block).cache_width for module in self.mtp]

    @property
    def further_fp8_cache_bytes(self) -> list[int | None]:
        """Bytes cached per token in FP8 by each MTP module; None where an attention has no such cache."""
        blocks = [cast(MultiTokenPrediction, module).block for module in self.mtp]
        return [getattr(_attention(block), "fp8_cache_bytes", None) for block in blocks]

    def forward(
        self, tokens_BS: Tensor, segments_BS: Tensor | None = None, record: ForwardRecord | None = None
    ) -> Tensor:
        """Training form: final (normed) hidden [B, S, D]. `segments_BS` numbers the documents packed in each row."""
        starts_BS = None if segments_BS is None else document_starts(segments_BS)
        rope = self.rotary(torch.arange(tokens_BS.shape[1], device=tokens_BS.device)[None])
        x_BSD = self.embedding(tokens_BS)
        for block in self.layers:
            x_BSD = block(x_BSD, rope, starts_BS, record)
        return self.norm(x_BSD)

    def predict_further(
        self,
        hidden_BSD: Tensor,
        next_tokens_BS: Tensor,
        depth: int,
        segments_BS: Tensor | None = None,
        record: ForwardRecord | None = None,
    ) -> Tensor:
        """Hidden of MTP module `depth`: from the previous depth's hidden at i and the embedding of the token at
        i + 1 + depth, it predicts the token at i + 2 + depth. All of length S."""
        starts_BS = None if segments_BS is None else document_starts(segments_BS)
        rope = self.rotary(torch.arange(next_tokens_BS.shape[1], device=next_tokens_BS.device)[None])
        return self.mtp[depth](self.embedding(next_tokens_BS), hidden_BSD, rope, starts_BS, record)

    def extend(self, tokens_BQ: Tensor, cache: list[Tensor], batch: CacheBatch) -> Tensor:
        """Generation form: caches the new tokens and returns their final (normed) hidden [B, Q, D]."""
        rope = self.rotary(batch.positions_BQ)
        x_BQD: Tensor = self.embedding(tokens_BQ)
        added_BQD: Tensor | None = None
        for block, cache_NW in zip(self.layers, cache, strict=True):
            x_BQD, added_BQD = cast(Block, block).extend(x_BQD, added_BQD, rope, cache_NW, batch)
        return self.norm(x_BQD) if added_BQD is None else self.norm.after_adding(added_BQD, x_BQD)[0]

    def extend_further(
        self, hidden_BQD: Tensor, next_tokens_BQ: Tensor, depth: int, cache_NW: Tensor, batch: CacheBatch
    ) -> Tensor:
        """Generation form of `predict_further`: caches an entry of module `depth` at each of the batch's positions i,
        made of the previous depth's hidden at i and the token at i + 1 + depth; returns its hidden [B, Q, D]."""
        rope = self.rotary(batch.positions_BQ)
        module = cast(MultiTokenPrediction, self.mtp[depth])
        return module.extend(self.embedding(next_tokens_BQ), hidden_BQD, rope, cache_NW, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """Unnormalised log-probabilities over the vocabulary, float32, [..., D] -> [..., V]."""
        return self.head(hidden).float()

    def few_rows_form(self) -> FewRows | None:
        """`extend` and `logits` for few rows on a CPU, made of the weights as they are now; None elsewhere."""
        return few_rows_form(self)

    def balance(self, loads: dict[int, Tensor]) -> None:
        """After an optimizer step: let each mixture correct its router from the load of the whole global batch."""
        for layer, load_E in loads.items():
            depth = layer - self.config.layers
            block = cast(Block, self.layers[layer]) if depth < 0 else self.mtp[depth].block
            block.ffn.balance(load_E)  # type: ignore[operator, union-attr]


def initialise(model: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Every matrix from N(0, std²), norms at one, biases at zero; buffers stay as they are."""
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
            elif name.endswith(".bias"):
                parameter.zero_()
            elif not name.endswith("norm.weight"):
                raise ValueError(f"parameter {name} is a vector that is neither norm nor bias; say how it starts")


def build_model(registry: Registry, config: ModelConfig, seed: int | None = None) -> Transformer:
    """Build a model from its config; with `seed`, initialise its weights (the same on every machine with that torch).

    Without a seed the weights are whatever the modules' constructors left: for loading over them, or on meta.
    """
    model = Transformer(registry, config)
    if seed is not None:
        initialise(model, config.init_std, torch.Generator().manual_seed(seed))
    return model
