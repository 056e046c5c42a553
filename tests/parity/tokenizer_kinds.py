"""Every kind of tokenizer.json that models come with, small: trained here, put together as the published ones are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog, 12 times or 345 times.",
    "def add(a, b):\n    return a + b  # the sum of a and b\n",
    "Don't stop: it isn't over, they've said. State the answer to 357 + 468 =",
    "Grüße aus Köln; 漢字 and emoji 🙂🙃 too.",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
Files = dict[str, Any]


def _trained(model: Any, trainer: Any, **parts: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        if name not in ("decoder", "post_processor"):
            setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(TEXTS, trainer)
    if "decoder" in parts:
        tokenizer.decoder = parts["decoder"]
    return tokenizer


def _template(tokenizer: tokenizers.Tokenizer, single: str, *tokens: str) -> None:
    pairs = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=pairs)


def _without_added(tokenizer: tokenizers.Tokenizer, tokens: list[str]) -> tokenizers.Tokenizer:
    """The trainer takes byte tokens for special ones; in published files they are in the vocabulary alone."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in tokens]
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def byte_level() -> tuple[tokenizers.Tokenizer, Files]:
    """GPT and Llama 3: byte-level BPE, special tokens behind the vocabulary, some of which swallow white space."""
    tokenizer = _trained(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(
        [
            "<|begin|>",
            AddedToken("<|end|>", normalized=False, special=True),
            AddedToken("<|user|>", rstrip=True, normalized=False, special=True),
            AddedToken("<|mask|>", lstrip=True, normalized=False, special=True),
        ]
    )
    tokenizer.add_tokens(["    ", AddedToken("<tool>", normalized=False)])
    _template(tokenizer, "<|begin|> $A", "<|begin|>")
    return tokenizer, {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "mask_token": "<|mask|>"}


def llama() -> tuple[tokenizers.Tokenizer, Files]:
    """Llama 2: BPE over text whose spaces are marks, bytes for what has no token, special tokens in the vocabulary."""
    special = ["<unk>", "<s>", "</s>"]
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = _trained(
        model,
        trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *BYTES], limit_alphabet=60, show_progress=False),
        normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        decoder=LLAMA_DECODER,
    )
    tokenizer = _without_added(tokenizer, BYTES)
    _template(tokenizer, "<s> $A", "<s>")
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}


def mistral() -> tuple[tokenizers.Tokenizer, Files]:
    """The later way of writing the same: only a document's first word is marked."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = _trained(
        model,
        trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *BYTES], limit_alphabet=60, show_progress=False),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoder=LLAMA_DECODER,
    )
    tokenizer = _without_added(tokenizer, BYTES)
    _template(tokenizer, "<s> $A", "<s>")
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gemma() -> tuple[tokenizers.Tokenizer, Files]:
    """Gemma: nothing is prepended, runs of spaces and lines are added tokens that are not special."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = _trained(
        model,
        trainers.BpeTrainer(vocab_size=420, special_tokens=[*special, *BYTES], limit_alphabet=60, show_progress=False),
        normalizer=normalizers.Replace(" ", "▁"),
        decoder=decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    tokenizer = _without_added(tokenizer, BYTES)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("\n\n", "▁▁", "<b>")])
    return tokenizer, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "add_bos_token": True}


def unigram() -> tuple[tokenizers.Tokenizer, Files]:
    """T5: Unigram, whose vocabulary could match its own special tokens; no token for begin."""
    tokenizer = _trained(
        models.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=180, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )
    _template(tokenizer, "$A </s>", "</s>")
    return tokenizer, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def word_piece() -> tuple[tokenizers.Tokenizer, Files]:
    """BERT: lower-cased words in pieces; texts do not come back letter by letter."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = _trained(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(cleanup=True),
    )
    _template(tokenizer, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return tokenizer, {**names, "mask_token": "[MASK]"}


def word_level() -> tuple[tokenizers.Tokenizer, Files]:
    """Whole words, cut at spaces alone, so that a special token in a text is a word of the vocabulary."""
    tokenizer = _trained(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(vocab_size=60, special_tokens=["<unk>", "<eos>"], show_progress=False),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    )
    return _without_added(tokenizer, ["<eos>"]), {"eos_token": "<eos>", "unk_token": "<unk>"}


def end_of_word() -> tuple[tokenizers.Tokenizer, Files]:
    """The first BPE: the end of a word is marked."""
    tokenizer = _trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"),
        trainers.BpeTrainer(
            vocab_size=200, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
        ),
        pre_tokenizer=pre_tokenizers.Whitespace(),
        decoder=decoders.BPEDecoder(),
    )
    return tokenizer, {"eos_token": "</s>", "unk_token": "<unk>"}


def with_holes() -> tuple[tokenizers.Tokenizer, Files]:
    """Ids that nobody has, and a decoder that joins what the rules made of all tokens together."""
    vocabulary = {"<unk>": 0, "a": 2, "b": 5, "ab": 9, "<end>": 11}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "AB")])
    return tokenizer, {"eos_token": "<end>"}


KINDS: dict[str, Callable[[], tuple[tokenizers.Tokenizer, Files]]] = {
    kind.__name__: kind
    for kind in (
        byte_level, llama, mistral, gemma, unigram, word_piece, word_level, end_of_word, with_holes,
    )
}  # fmt: skip


def write(name: str, directory: Path) -> tokenizers.Tokenizer:
    """Write a kind's files into a directory; returns the library's own tokenizer."""
    tokenizer, config = KINDS[name]()
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
