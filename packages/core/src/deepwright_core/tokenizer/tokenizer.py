"""The tokenizer as the rest of deepwright sees it.

Two views of one tokenizer.json are kept. The *marked* one recognises special tokens in text; the *plain* one has had
them taken out of its tables, so that a special token in somebody's text is just characters. `encode` uses the plain
one unless told otherwise: text is data, and only this project's own code places special tokens.

Left out: truncation, padding, and anything to do with batches of unequal length; packing does that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from .. import chat
from ..chat import Thinking
from ..errors import RequestError
from ..stage import write_atomically
from .special import ASSISTANT, BOS, CONTROL_TOKENS, EOS, PAD, SPECIAL_TOKENS, THINK_END, THINK_START, USER

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """Text to ids and back, with DeepSeek's special tokens and a chat form.

    `source` is the content of a tokenizer.json. Special tokens that it lacks are added behind its last id.
    `names` gives other spellings for begin, end and padding, as another model's tokenizer has them.
    """

    def __init__(
        self, source: str, *, names: Mapping[str, str] | None = None, template: str = chat.CHAT_TEMPLATE
    ) -> None:
        names = names or {}
        self.bos = names.get("bos_token") or BOS
        self.eos = names.get("eos_token") or EOS
        self.pad = names.get("pad_token") or PAD
        self.template = template
        self._marked = _with_special_tokens(source, (self.bos, self.eos, self.pad))
        self._plain = _without_special_tokens(self._marked.to_str())
        self.vocab_size: int = self._marked.get_vocab_size(with_added_tokens=True)
        self.bos_id = self._id(self.bos)
        self.eos_id = self._id(self.eos)
        self.pad_id = self._id(self.pad)
        self.user_id = self._id(USER)
        self.assistant_id = self._id(ASSISTANT)
        self.think_start_id = self._id(THINK_START)
        self.think_end_id = self._id(THINK_END)
        added = json.loads(self._marked.to_str())["added_tokens"]
        self.special_ids = frozenset(token["id"] for token in added if token["special"]) | {
            self.think_start_id,
            self.think_end_id,
        }
        self._bytes = _bytes_of_tokens(self._marked)

    def _id(self, token: str) -> int:
        found = self._marked.token_to_id(token)
        if found is None:
            raise RequestError(f"The tokenizer has no token '{token}'; train it again or choose another.")
        return found

    # Text -----------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text, without begin or end. Special tokens in the text count as such only if allowed."""
        view = self._marked if allow_special else self._plain
        return view.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts at once, on all of the threads that the tokenizers library uses. No special tokens."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. `skip_special` leaves out all seven special tokens, the marks of thinking among them."""
        kept = (i for i in ids if not (skip_special and i in self.special_ids))
        return b"".join(self.token_bytes(i) for i in kept).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token. Ids without a token (a model may have more rows than tokens) have none."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def extends(self, other: Tokenizer) -> bool:
        """Whether every text has the same ids here as in `other`, which may have fewer added tokens."""
        ours, theirs = (json.loads(tokenizer._marked.to_str()) for tokenizer in (self, other))
        same = all(ours[part] == theirs[part] for part in ("normalizer", "pre_tokenizer", "model"))
        return same and all(token in ours["added_tokens"] for token in theirs["added_tokens"])

    # Chat -----------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: Thinking = "auto",
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation. What the messages say is encoded as plain text, whatever it looks like."""
        if self.template == chat.CHAT_TEMPLATE:
            pieces = chat.pieces(messages, thinking=thinking, add_generation_prompt=add_generation_prompt)
            return [i for piece in pieces for i in piece.ids(self)]
        rendered = chat.render_apart(self, messages, thinking=thinking, add_generation_prompt=add_generation_prompt)
        return [i for text, is_content in rendered for i in self.encode(text, allow_special=not is_content)]

    # Files ----------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as other programs read them."""
        directory = Path(directory)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": self.pad,
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": int(1e30),
            "chat_template": self.template,
        }
        write_atomically(directory / TOKENIZER_FILE, self._marked.to_str(pretty=True))
        write_atomically(directory / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_atomically(directory / TEMPLATE_FILE, self.template)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read what `save` wrote, or any directory with a tokenizer.json."""
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            raise RequestError(f"{path} does not exist; a tokenizer's directory holds a {TOKENIZER_FILE}.")
        names, template = _other_spellings(directory)
        try:
            return cls(path.read_text(encoding="utf-8"), names=names, template=template)
        except RequestError:
            raise
        except Exception as error:  # the library raises plain Exception for files it cannot read
            raise RequestError(f"{path} is not a tokenizer that can be read: {error}.") from error


def _other_spellings(directory: Path) -> tuple[dict[str, str], str]:
    """Names of begin, end and padding, and the chat template, from the files beside a tokenizer.json."""
    names: dict[str, str] = {}
    template = chat.CHAT_TEMPLATE
    path = directory / CONFIG_FILE
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(f"{path} is not valid JSON: {error}.") from error
        for key in ("bos_token", "eos_token", "pad_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                names[key] = value
        if isinstance(config.get("chat_template"), str):
            template = config["chat_template"]
    if (directory / TEMPLATE_FILE).is_file():
        template = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    return names, template


def _with_special_tokens(source: str, control: Sequence[str]) -> tokenizers.Tokenizer:
    view = tokenizers.Tokenizer.from_str(source)
    for token in (*control, *SPECIAL_TOKENS[3:]):
        special = token in control or token in CONTROL_TOKENS
        known = [t for t in view.get_added_tokens_decoder().values() if t.content == token]
        if not known:
            added = tokenizers.AddedToken(token, normalized=False, special=special)
            view.add_special_tokens([added]) if special else view.add_tokens([added])
    return view


def _without_special_tokens(source: str) -> tokenizers.Tokenizer:
    data = json.loads(source)
    data["added_tokens"] = []
    data["post_processor"] = None  # it may name the tokens just taken out
    return tokenizers.Tokenizer.from_str(json.dumps(data))


def _bytes_of_tokens(view: tokenizers.Tokenizer) -> list[bytes]:
    """What each id stands for. Byte-level vocabularies write a byte as one printable character; this undoes it."""
    if "ByteLevel" not in json.dumps(json.loads(view.to_str())["decoder"]):
        raise RequestError("The tokenizer is not byte-level; choose one whose tokenizer.json has a ByteLevel decoder.")
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}
    added = {i: token.content for i, token in view.get_added_tokens_decoder().items()}
    vocabulary = view.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        table[i] = added[i].encode() if i in added else bytes(byte_of[character] for character in token)
    return table
