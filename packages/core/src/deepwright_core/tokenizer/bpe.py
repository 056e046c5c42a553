"""Training a byte-level BPE tokenizer.

Byte-level, so that every text can be encoded; digits stand alone, so that a number is always the same tokens whatever
stands around it, which small models need to calculate. The merges are learnt with the `tokenizers` library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal

import tokenizers
from pydantic import Field
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from ..errors import RequestError
from ..registry import ComponentConfig
from .special import BOS, SPECIAL_TOKENS, THINK_END, THINK_START
from .tokenizer import Tokenizer

BYTES = 256


class BpeConfig(ComponentConfig):
    """Byte-level BPE trained on the training split; digits one by one.

    vocab_size: tokens in all, special tokens and the 256 bytes included. A small corpus may give fewer.
    min_frequency: how often a pair must occur to become a token.
    """

    name: Literal["bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=BYTES + len(SPECIAL_TOKENS), le=2**20)
    min_frequency: int = Field(2, ge=1)


def train(config: BpeConfig, documents: Iterable[str]) -> Tokenizer:
    """Byte-level BPE trained on the training split; digits one by one."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        show_progress=False,
        special_tokens=[tokenizers.AddedToken(t, normalized=False, special=True) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    seen = False

    def texts() -> Iterable[str]:
        nonlocal seen
        for text in documents:
            seen = True
            yield text

    bpe.train_from_iterator(texts(), trainer=trainer)
    if not seen:
        raise RequestError("The tokenizer got no text to learn from: the training split is empty.")
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    data = json.loads(bpe.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] not in (THINK_START, THINK_END)
    return Tokenizer(json.dumps(data, ensure_ascii=False))
