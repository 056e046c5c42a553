"""The tokenizer as the rest of deepwright sees it.

A tokenizer is what its tokenizer.json says, verbatim: any kind that the `tokenizers` library knows, with the ids of the
file and no token added. `encode` does not recognise control tokens in text (see `views`): text is data, and only this
project's own code places them. A role that the file has no token for has no id: `None`.

Left out: truncation, padding, and anything to do with batches of unequal length; packing does that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from .. import chat
from ..chat import Thinking
from ..errors import RequestError
from ..stage import write_atomically
from . import views
from .conventions import Conventions
from .decoding import decoding
from .special import CONTROL_TOKENS, MARKS

TOKENIZER_FILE = "tokenizer.json"
NAMED_MARKS = ("bos", "eos", "pad")  # those that a tokenizer may spell in its own way
# What a conversation is written with; a tokenizer may also know the marks of tools.
CHAT_MARKS = ("bos", "eos", "user", "assistant", "think_start", "think_end")


class Control(NamedTuple):
    """A control token: its id, and whether it swallows the white space before and after it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class Tokenizer:
    """Text to ids and back, and conversations to ids.

    source: the content of a tokenizer.json. conventions: what the files beside it say.
    vocab_size: one more than the highest id, which is how many rows a model needs; ids below it may be unused.
    marks: the names in `special.MARKS` that this tokenizer has a token for -> its id.
    control: spelling -> every token that is never text: those that the files call special, the marks, and other added
    tokens that the chat template writes. special_ids: those of them that decoding leaves out.
    end_ids: what ends a generated text. begin_ids: what stands before a text.
    """

    def __init__(self, source: str, conventions: Conventions | None = None) -> None:
        self.source = source
        data = views.parse(source)
        conventions = conventions or Conventions()
        # A single character with a role ("!" for padding) is still what everybody writes.
        named = [token for token in (*conventions.names.values(), *conventions.further) if len(token) > 1]
        self._marked = views.marked(source, named)
        ids = self._marked.get_vocab(with_added_tokens=True)
        if not ids:
            raise RequestError("tokenizer.json is not a tokenizer that can be used: it has no tokens.")
        self.vocab_size: int = max(ids.values()) + 1
        names = {role: token for role, token in conventions.names.items() if token in ids}
        self.spelling = MARKS | {mark: names[f"{mark}_token"] for mark in MARKS if f"{mark}_token" in names}
        self.marks = {mark: ids[token] for mark, token in self.spelling.items() if token in ids}
        names |= {f"{mark}_token": self.spelling[mark] for mark in NAMED_MARKS if mark in self.marks}
        self.begin_ids = views.begin_ids(data.get("post_processor"))
        if not self.begin_ids and conventions.begins and self.bos_id is not None:
            self.begin_ids = (self.bos_id,)
        begins = self.bos_id is not None and self.begin_ids[:1] == (self.bos_id,)
        self.conventions = replace(conventions, names=names, begins=begins)

        added = self._marked.get_added_tokens_decoder()
        special = {token.content for token in added.values() if token.special}
        special |= {token for token in (*named, *MARKS.values()) if token in ids}
        written = f"{conventions.template or ''}\0{conventions.tool_template or ''}"
        self.control = {token: Control(ids[token]) for token in special}
        for i, token in added.items():
            if token.content in special or (token.content in written and not token.content.isspace()):
                self.control[token.content] = Control(i, token.lstrip, token.rstrip)
        self.special_ids = frozenset(ids[token] for token in special)
        self._plain = views.plain(data | {"added_tokens": data.get("added_tokens") or []}, self.control)
        self.decoding = decoding(self._marked, data.get("decoder"))
        self.end_ids = frozenset(conventions.end_ids) | ({self.eos_id} if self.eos_id is not None else set())

    # Ids with a role ------------------------------------------------------------------------------

    @property
    def bos_id(self) -> int | None:
        return self.marks.get("bos")

    @property
    def eos_id(self) -> int | None:
        return self.marks.get("eos")

    @property
    def pad_id(self) -> int | None:
        return self.marks.get("pad")

    @property
    def user_id(self) -> int | None:
        return self.marks.get("user")

    @property
    def assistant_id(self) -> int | None:
        return self.marks.get("assistant")

    @property
    def think_start_id(self) -> int | None:
        return self.marks.get("think_start")

    @property
    def think_end_id(self) -> int | None:
        return self.marks.get("think_end")

    @property
    def filler_id(self) -> int:
        """Fills rows up where nothing is learnt: padding, else the end, else any."""
        return next((i for i in (self.pad_id, self.eos_id) if i is not None), 0)

    def mark_id(self, mark: str) -> int:
        """The id of a mark by its name; `RequestError` when this tokenizer has no token for it."""
        if mark not in self.marks:
            raise RequestError(chat.lacking([self.spelling[mark]]))
        return self.marks[mark]

    # Text -----------------------------------------------------------------------------------------

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of a text, without begin or end. Special tokens in the text count as such only if allowed."""
        return self._encode([text], self._marked if allow_special else self._plain)[0]

    def encode_batch(self, texts: Sequence[str], *, inside: bool = False) -> list[list[int]]:
        """Ids of many texts at once, on all of the threads that the tokenizers library uses. No special tokens.

        inside: the texts stand behind a special token, not at the beginning of a document; some tokenizers tell.
        """
        if not inside:
            return self._encode(texts, self._plain)
        return [ids[1:] for ids in self._encode([views.ANCHOR + text for text in texts], self._plain)]

    @staticmethod
    def _encode(texts: Sequence[str], view: tokenizers.Tokenizer) -> list[list[int]]:
        try:
            return [encoding.ids for encoding in view.encode_batch_fast(list(texts), add_special_tokens=False)]
        except Exception as error:  # the library's plain Exception: no token for a character, and none for unknown ones
            raise RequestError(f"The tokenizer cannot encode this text: {error}.") from error

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids. `skip_special` leaves out all special tokens, the marks of thinking and of tools among them."""
        return self.decoding.decode(i for i in ids if not (skip_special and i in self.special_ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token adds inside of a text, possibly part of a character; a special token's are its
        spelling's. An id without a token has none."""
        known = self.decoding.token_bytes()
        if known is not None:
            return known.get(token_id, b"")
        # What it shows behind itself: at the beginning of a text, some tokens lose the space that they bring.
        once, twice = (self.decode([token_id] * count, skip_special=False) for count in (1, 2))
        return twice[len(once) :].encode()

    # Chat -----------------------------------------------------------------------------------------

    @property
    def chats(self) -> bool:
        """Whether conversations can be encoded: with the tokenizer's own template, or in deepwright's chat form."""
        return not chat.is_ours(self.conventions.template) or all(mark in self.marks for mark in CHAT_MARKS)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: Thinking = "auto",
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation. What the messages and tools say is encoded as plain text, whatever it looks like."""
        form = chat.pieces(self, messages, tools=tools, thinking=thinking, add_generation_prompt=add_generation_prompt)
        return [i for ids in chat.encode_pieces(self, [form])[0] for i in ids]

    def with_chat_form(self) -> Tokenizer:
        """This tokenizer with deepwright's chat form as its template. Marks that it lacks get ids behind its last one;
        its own tokens for begin, end and padding are kept."""
        missing = [token for mark, token in self.spelling.items() if mark not in self.marks]
        source = views.with_added(self.source, missing, CONTROL_TOKENS) if missing else self.source
        names = {f"{mark}_token": self.spelling[mark] for mark in NAMED_MARKS}
        conventions = replace(
            self.conventions,
            names=self.conventions.names | names,
            begins=True,
            template=chat.CHAT_TEMPLATE,
            tool_template=None,
        )
        grown = Tokenizer(source, conventions)
        if any(grown.control[token].id < self.vocab_size for token in missing):
            raise RequestError(
                "The tokenizer has unused ids below its last one, and the tokenizers library would give them to the "
                "tokens of the chat form; give the unused ids tokens of their own first."
            )
        return grown

    def extends(self, other: Tokenizer) -> bool:
        """Whether texts get the ids that `other` gives them: the same rules, and all of its tokens by the same ids."""
        ours, theirs = views.parse(self.source), views.parse(other.source)
        parts = ("model", "normalizer", "pre_tokenizer", "decoder")
        ids = self._marked.get_vocab(with_added_tokens=True)
        same = all(ids.get(token) == i for token, i in other._marked.get_vocab(with_added_tokens=True).items())
        return same and all(ours.get(part) == theirs.get(part) for part in parts)

    # Files ----------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        """Write tokenizer.json as it was read, and the files beside it, as other programs read them."""
        directory = Path(directory)
        for name, content in {TOKENIZER_FILE: self.source, **self.conventions.files()}.items():
            write_atomically(directory / name, content)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """Read what `save` wrote, or any directory with a tokenizer.json."""
        directory = Path(directory)
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            hint = (
                "; transformers can make one of a tokenizer.model" if (directory / "tokenizer.model").is_file() else ""
            )
            raise RequestError(f"{path} does not exist; a tokenizer's directory holds a {TOKENIZER_FILE}{hint}.")
        conventions = Conventions.read(directory)
        try:
            return cls(path.read_text(encoding="utf-8"), conventions)
        except RequestError as error:
            raise RequestError([f"{directory}/{problem}" for problem in error.problems]) from error
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{path} cannot be read: {error}.") from error
