"""Ids back to text: whole, or one token at a time.

A byte-level vocabulary says for each token which bytes it stands for; a text is their concatenation, and a stream holds
back the bytes of an unfinished character. Every other kind of tokenizer has rules of its own (a space between words, a
mark for one, bytes written as <0xE4>), which the tokenizers library applies. Its own `DecodeStream` is not used: it
shows a run of bytes before the run has ended, and the rest may make the library read all of them as broken.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import tokenizers

SPACE_STEPS = ("Replace", "ByteFallback", "Metaspace", "Fuse", "Strip")  # what tokens with marked spaces are decoded by
FRAGMENT = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Stream(Protocol):
    """Text that became certain with a token; `flush` gives what is left at the end. Together: the decoded text."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Decoding(Protocol):
    """How a tokenizer's ids become text. Ids without a token stand for nothing."""

    def decode(self, ids: Iterable[int]) -> str: ...

    def stream(self) -> Stream: ...

    def token_bytes(self) -> Mapping[int, bytes] | None:
        """The bytes that each token stands for inside of a text; None: that depends on the tokens around it."""


def decoding(view: tokenizers.Tokenizer, decoder: Mapping[str, Any] | None) -> Decoding:
    """The way of decoding that a tokenizer.json asks for with its `decoder`."""
    tokens = {i: token for token, i in view.get_vocab(with_added_tokens=True).items()}
    tokens |= {i: token.content for i, token in view.get_added_tokens_decoder().items()}
    steps = _steps(decoder)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevelDecoding(tokens)
    fragments = {i for i, token in tokens.items() if FRAGMENT.fullmatch(token)}
    by_bytes = any(step["type"] == "ByteFallback" for step in steps)
    # Without a decoder, the library puts spaces between tokens.
    spaced = bool(steps) and all(step["type"] in SPACE_STEPS for step in steps)
    return LibraryDecoding(
        view,
        frozenset(tokens),
        frozenset(fragments if by_bytes else ()),
        _token_by_token(steps),
        _marked_bytes(tokens, fragments if by_bytes else set(), steps) if spaced else None,
    )


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _token_by_token(steps: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the text of a token depends on nothing but the token before it and the run of bytes that it is in."""
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif not fused and kind in ("Replace", "ByteFallback", "Metaspace", "WordPiece", "BPEDecoder", "Strip"):
            continue
        elif not (kind == "Strip" and step["start"] <= 1 and not step["stop"]):
            return False
    return True


def _marked_bytes(
    tokens: Mapping[int, str], fragments: Collection[int], steps: Sequence[Mapping[str, Any]]
) -> Mapping[int, bytes] | None:
    """Bytes of tokens in which a mark stands for a space. What `Strip` takes from the beginning of a text is kept."""
    marks = {}
    for step in steps:
        if step["type"] == "Metaspace":
            marks[step["replacement"]] = " "
        elif step["type"] == "Replace":
            if "String" not in step["pattern"]:
                return None
            marks[step["pattern"]["String"]] = step["content"]

    def bytes_of(i: int, token: str) -> bytes:
        if i in fragments:
            return bytes([int(token[3:5], 16)])
        for mark, text in marks.items():
            token = token.replace(mark, text)
        return token.encode()

    return {i: bytes_of(i, token) for i, token in tokens.items()}


# Byte-level ---------------------------------------------------------------------------------------


class ByteLevelDecoding:
    """Each byte is written as one printable character; this undoes it."""

    def __init__(self, tokens: Mapping[int, str]) -> None:
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(rest)}

        def bytes_of(token: str) -> bytes:
            written = [byte_of.get(character) for character in token]
            # An added token is written as it is, unless all of it could be bytes: the library's rule.
            return token.encode() if None in written else bytes(byte for byte in written if byte is not None)

        self._bytes = {i: bytes_of(token) for i, token in tokens.items()}

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def stream(self) -> Stream:
        return _ByteLevelStream(self._bytes)

    def token_bytes(self) -> Mapping[int, bytes] | None:
        return self._bytes


class _ByteLevelStream:
    def __init__(self, table: Mapping[int, bytes]) -> None:
        self._bytes = table
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._characters.decode(self._bytes.get(token_id, b""))

    def flush(self) -> str:
        # Bytes still held back never became a character: they show as the replacement character.
        return self._characters.decode(b"", final=True)


# Every other kind ---------------------------------------------------------------------------------


class LibraryDecoding:
    """The library decodes.

    known: ids that have a token. fragments: those that stand for a byte. token_by_token: whether text can be told
    before all of it is there. token_bytes: see `Decoding`.
    """

    def __init__(
        self,
        view: tokenizers.Tokenizer,
        known: frozenset[int],
        fragments: frozenset[int],
        token_by_token: bool,
        token_bytes: Mapping[int, bytes] | None,
    ) -> None:
        self._view = view
        self._known = known
        self.fragments = fragments
        self.token_by_token = token_by_token
        self._bytes = token_bytes

    def decode(self, ids: Iterable[int]) -> str:
        return self._view.decode([i for i in ids if i in self._known], skip_special_tokens=False)

    def stream(self) -> Stream:
        return _LibraryStream(self, self._known)

    def token_bytes(self) -> Mapping[int, bytes] | None:
        return self._bytes


class _LibraryStream:
    """Decodes each token behind the one before it, and shows what is new. Runs of bytes wait for their end."""

    def __init__(self, decoding: LibraryDecoding, known: frozenset[int]) -> None:
        self._decoding = decoding
        self._known = known
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that are known already

    def push(self, token_id: int) -> str:
        if token_id not in self._known:
            return ""
        self._window.append(token_id)
        if not self._decoding.token_by_token or token_id in self._decoding.fragments:
            return ""
        text = self._decoding.decode(self._window)[self._shown :]
        self._window = [token_id]
        self._shown = len(self._decoding.decode(self._window))
        return text

    def flush(self) -> str:
        text = self._decoding.decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return text
