"""Training a byte-level BPE tokenizer.

Byte-level, so that every text can be encoded. How text is cut before tokens are looked for is a choice: by default
digits stand alone, so that a number is always the same tokens whatever stands around it, which small models need to
calculate; or as DeepSeek-V3 cuts it. The merges are learnt with the `tokenizers` library.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Literal

import tokenizers
from pydantic import Field
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

from ..chat import CHAT_TEMPLATE
from ..errors import RequestError
from ..registry import ComponentConfig
from .conventions import Conventions
from .special import BOS, CONTROL_TOKENS, SPECIAL_TOKENS
from .tokenizer import Tokenizer

BYTES = 256
# DeepSeek-V3's cuts, one after the other: up to three digits; Chinese and Japanese; words, punctuation and white space.
DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)


class BpeConfig(ComponentConfig):
    """Byte-level BPE trained on the training split.

    vocab_size: tokens in all, special tokens and the 256 bytes included. A small corpus may give fewer.
    min_frequency: how often a pair must occur to become a token.
    pre_tokenizer: digits (each a token of its own) or deepseek_v3 (numbers in threes, as the published models).
    """

    name: Literal["bpe"] = "bpe"
    vocab_size: int = Field(4096, ge=BYTES + len(SPECIAL_TOKENS), le=2**20)
    min_frequency: int = Field(2, ge=1)
    pre_tokenizer: Literal["digits", "deepseek_v3"] = "digits"


def train(config: BpeConfig, documents: Iterable[str]) -> Tokenizer:
    """Byte-level BPE trained on the training split."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(_cuts(config))
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
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer(json.dumps(data, indent=2, ensure_ascii=False), Conventions(begins=True, template=CHAT_TEMPLATE))


def _cuts(config: BpeConfig) -> list[pre_tokenizers.PreTokenizer]:
    if config.pre_tokenizer == "deepseek_v3":
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in DEEPSEEK_V3]
        return [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
