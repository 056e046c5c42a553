"""What an answer may look like: JSON of a schema, any JSON object, a regular expression, one of several texts.

llguidance does the work: it parses Earley-style over lexemes whose regular expressions it turns into automata as they
are needed, and says for every place of an answer which tokens of the vocabulary may stand there. It is one wheel of
3 MB without dependencies, which is why it was preferred to xgrammar (torch, triton, transformers and a runtime of its
own); the two know about the same JSON schemas.

A schema or an expression of a stranger's may be written to be expensive. Its size, its depth and its repetitions are
bounded here; what compiling and each step may cost is bounded by the library, which counts (`LIMITS`): compiling ends
within about a second and holds no lock of Python's meanwhile, a step within some tens of milliseconds.
Left out: tokenizers whose tokens do not stand for bytes (WordPiece).

Shapes: W words of 32 tokens each, in which bit t % 32 of word t // 32 says whether token t may come next.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import RequestError

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]

MAX_SOURCE_BYTES = 65_536
MAX_DEPTH = 64
MAX_CHOICES = 1024
MAX_EXPANSION = 20_000
"""Pieces that an expression has more when its counted repetitions are written out; the library does not count those. A
step over so many takes about 50 ms, over a million more than a second."""
WORD_BITS = 32

# Without an end, white space is where an unsure model stays for ever: one space, or one line end with its indentation.
WHITE_SPACE = r"[ ]|\n[ ]{0,32}|\n\t{0,16}"

LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,  # compiling; about 20 ms
    "step_lexer_fuel": 200_000,  # a step; about 15 ms
    "step_max_items": 50_000,  # a step; about 3 ms
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,  # an answer's memory; about 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class GrammarState:
    """Where an answer stands in a grammar.

    allowed_W: int32, the tokens that may come next (ends of text are not among them). accepting: whether the answer
    may end here.
    """

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self.allowed_W = self._mask()
        self.accepting: bool = matcher.is_accepting()

    @property
    def stuck(self) -> bool:
        """Whether no token can follow: the text is complete (`accepting`), or a limit of the library was reached."""
        return not self.allowed_W.any()

    @property
    def reason(self) -> str:
        """Why it is stuck without being complete, in the library's words."""
        return _reason(self._matcher)

    def advance(self, token: int) -> None:
        """Go on behind a token that was allowed."""
        consumed = self._matcher.consume_token(token)
        self.allowed_W = self._mask() if consumed else self._nothing()
        self.accepting = consumed and self._matcher.is_accepting()

    def _nothing(self) -> np.ndarray:
        # The library's own end of text has a bit behind the last token's.
        return np.zeros(self._vocabulary // WORD_BITS + 1, dtype=np.int32)

    def _mask(self) -> np.ndarray:
        mask_W = self._nothing()
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, mask_W.nbytes)
            set_bits(mask_W, [self._vocabulary], False)
        return mask_W


def set_bits(mask_W: np.ndarray, tokens: Iterable[int], value: bool) -> None:
    """Allow or forbid tokens in a mask; those behind its end are not of its vocabulary."""
    words_W = mask_W.view(np.uint32)
    for token in tokens:
        if token >= WORD_BITS * len(words_W):
            continue
        bit = np.uint32(1 << token % WORD_BITS)
        if value:
            words_W[token // WORD_BITS] |= bit
        else:
            words_W[token // WORD_BITS] &= ~bit


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar, which any number of requests may share. vocabulary: one more than its highest token."""

    kind: GrammarKind
    vocabulary: int
    _matcher: Any

    def start(self) -> GrammarState:
        """The state of an answer that has no token yet. It may be stuck, when others before it used up a limit."""
        return GrammarState(self._matcher.deep_copy(), self.vocabulary)


def compile_grammar(tokenizer: Tokenizer, kind: GrammarKind, source: Any = None) -> Grammar:
    """Compile a grammar for a tokenizer; `RequestError` when it cannot be.

    source: a JSON schema as a mapping or as text; nothing for json_object; a regular expression (Rust's syntax, which
    has no look-around; it must match the whole answer); a list of texts for choice; for lark, a grammar as llguidance
    writes them, in which `<[7]>` stands for the token 7 and `%json {...}` for JSON of a schema.
    It takes up to about a second, during which other threads run; the first for a tokenizer also builds its trie.
    """
    if kind not in get_args(GrammarKind):
        raise RequestError(f"The kind of grammar is '{kind}'; expected one of {', '.join(get_args(GrammarKind))}.")
    llguidance = _library()
    try:
        text = _text(llguidance.LLMatcher, kind, source)
    except RequestError:
        raise
    except ValueError as error:  # half of a character, written as an escape
        raise RequestError(f"{_subject(kind)} cannot be used: {error}.") from error
    matcher = llguidance.LLMatcher(_trie(tokenizer), text, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))
    if matcher.is_error():
        raise RequestError(f"{_subject(kind)} cannot be used: {_reason(matcher)}.")
    grammar = Grammar(kind, tokenizer.vocab_size, matcher)
    # What is too much for a step shows at the first ones, here instead of in everybody's. States share what the library
    # has worked out, and its count goes on from one to the next.
    for state in (grammar.start(), grammar.start()):
        if state.stuck:
            raise RequestError(f"{_subject(kind)} cannot be used: {state.reason}.")
    return grammar


# Sources ------------------------------------------------------------------------------------------


def _text(library: Any, kind: GrammarKind, source: Any) -> str:
    """The source in the library's form; refuses what is out of bounds."""
    if kind == "json_object":
        if source is not None:
            raise RequestError("A grammar of the kind json_object takes no source; expected None.")
        return str(library.grammar_from_json_schema({"type": "object"}, overrides=_json_options()))
    if kind == "json_schema":
        return str(library.grammar_from_json_schema(_schema(source), overrides=_json_options()))
    if kind == "choice":
        return str(library.grammar_from_lark("start: " + " | ".join(_choices(source))))
    if not isinstance(source, str) or not source:
        raise RequestError(f"{_subject(kind)} is {_shown(source)}; expected a text of at least one character.")
    _bound_size(kind, source)
    _bound_depth(kind, _deepest(source))
    _bound_repetitions(kind, source)  # in the text of a grammar, those of all its expressions and schemas
    return str(library.grammar_from_regex(source) if kind == "regex" else library.grammar_from_lark(source))


def _json_options() -> dict[str, Any]:
    return {"whitespace_flexible": True, "whitespace_pattern": WHITE_SPACE, "lenient": False}


def _schema(source: Any) -> str:
    if isinstance(source, str):
        _bound_size("json_schema", source)
        _bound_depth("json_schema", _deepest(source))
        try:
            source = json.loads(source)
        except ValueError as error:
            raise RequestError(f"The JSON schema is not JSON: {error}.") from error
    if not isinstance(source, dict):
        raise RequestError(f"The JSON schema is {_shown(source)}; expected an object.")
    try:
        text = json.dumps(source)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"The JSON schema cannot be written as JSON: {error}.") from error
    _bound_size("json_schema", text)
    _bound_depth("json_schema", _deepest(text))
    for pattern in _patterns(source):
        _bound_repetitions("json_schema", pattern)
    return text


def _patterns(schema: Any) -> Iterator[str]:
    """The expressions in a schema."""
    if isinstance(schema, list):
        for part in schema:
            yield from _patterns(part)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            if key == "pattern" and isinstance(value, str):
                yield value
            elif key == "patternProperties" and isinstance(value, dict):
                yield from value
            yield from _patterns(value)


def _choices(source: Any) -> list[str]:
    if not isinstance(source, (list, tuple)) or not source or not all(isinstance(c, str) and c for c in source):
        raise RequestError(f"The choices are {_shown(source)}; expected a list of texts of at least one character.")
    if len(source) > MAX_CHOICES:
        raise RequestError(f"There are {len(source)} choices; expected at most {MAX_CHOICES}.")
    written = [json.dumps(choice, ensure_ascii=False) for choice in source]
    _bound_size("choice", "".join(written))
    return written


def _bound_size(kind: GrammarKind, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"{_subject(kind)} holds half of a character (a lone surrogate); expected text.") from error
    if size > MAX_SOURCE_BYTES:
        raise RequestError(f"{_subject(kind)} has {size} bytes; expected at most {MAX_SOURCE_BYTES}.")


def _bound_depth(kind: GrammarKind, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise RequestError(f"{_subject(kind)} is nested {depth} deep; expected at most {MAX_DEPTH}.")


def _deepest(text: str) -> int:
    """How deep brackets of any kind are nested. Those in strings count too: a bound need not be exact."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(depth - 1, 0)
    return deepest


def _bound_repetitions(kind: GrammarKind, expression: str) -> None:
    more = _expansion(expression)
    if more > MAX_EXPANSION:
        raise RequestError(
            f"{_subject(kind)} has repetitions that are {more} pieces more when they are written out; expected at most "
            f"{MAX_EXPANSION}."
        )


PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)
"""An escape, a class of characters, a counted repetition, or any other character."""


def _expansion(expression: str) -> int:
    """About how many pieces an expression has more when what `{n}` and `{m,n}` repeat is written out so often."""
    sizes, last, written = [0], [0], 0  # of each open group: its pieces so far, and those of its last part
    for piece in PIECES.finditer(expression):
        if piece[0] == "(":
            sizes.append(0)
            last.append(0)
        elif piece[0] == ")" and len(sizes) > 1:
            sizes[-2] += sizes[-1]
            last.pop()
            last[-1] = sizes.pop()
        elif piece[1] is not None:
            times = max(int(piece[1]), int(piece[2] or 0))
            sizes[-1] += last[-1] * (times - 1)
            last[-1] *= times
        else:
            sizes[-1] += 1
            last[-1] = 1
            written += 1
    return sum(sizes) - written


def _subject(kind: GrammarKind) -> str:
    return {
        "json_schema": "The JSON schema",
        "json_object": "The grammar of JSON objects",
        "regex": "The regular expression",
        "choice": "The list of choices",
        "lark": "The grammar",
    }[kind]


def _shown(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 80 else f"{written[:77]}..."


def _reason(matcher: Any) -> str:
    """What the library says, in one line: where an expression is wrong, that is the last of several."""
    lines = [line.strip() for line in matcher.get_error().split("\n") if line.strip()]
    causes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = causes[0] if causes else lines[0] if lines else "NoExtension"
    return "no text of at least one token fits it" if said.startswith("NoExtension") else said.rstrip(".")


# The library and the vocabulary -------------------------------------------------------------------


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise RequestError(
            "Structured output needs the package llguidance; install deepwright-core[grammar]."
        ) from error
    return llguidance


class _Vocabulary:
    """A tokenizer in the form that the library takes.

    The end of text is a token of its own behind the last: which tokens end an answer is for the request to say.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: Mapping[int, bytes]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.vocab_size
        special = {control.id for control in tokenizer.control.values()}
        # Tokens without bytes could stand anywhere for ever; ids without a token never.
        special |= {i for i in range(tokenizer.vocab_size) if not tokens.get(i)}
        self.special_token_ids = [*sorted(special), self.eos_token_id]
        self._ids = {token: i for i, token in tokens.items() if i not in special}
        self._longest = max(map(len, self._ids), default=0)
        # The library wants a name for each special token and takes the first character for a mark.
        self.tokens = [f"<{i}>".encode() if i in special else tokens[i] for i in range(tokenizer.vocab_size)] + [
            b"<end>"
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        """How a text that can only go on in one way is cut: as the tokenizer would, where that is just this text."""
        wanted = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode_batch([wanted.decode(errors="replace")], inside=True)[0]
        # Tokenizers with marked spaces put one before a text, and some change characters.
        return ids if b"".join(map(self.tokens.__getitem__, ids)) == wanted else self._longest_first(wanted)

    def _longest_first(self, text: bytes) -> list[int]:
        ids = []
        while text:
            length = next((n for n in range(min(self._longest, len(text)), 0, -1) if text[:n] in self._ids), 0)
            if not length:
                break  # no token goes on from here: the library is told what there is
            ids.append(self._ids[text[:length]])
            text = text[length:]
        return ids


_tries: weakref.WeakKeyDictionary[Tokenizer, Any] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _trie(tokenizer: Tokenizer) -> Any:
    """The library's form of a tokenizer, made once."""
    with _lock:
        if tokenizer not in _tries:
            tokens = tokenizer.decoding.token_bytes()
            if tokens is None:
                raise RequestError(
                    "Structured output needs a tokenizer whose tokens each stand for certain bytes (byte-level BPE, or "
                    "BPE and Unigram with marked spaces); this one's do not."
                )
            _tries[tokenizer] = _library().LLTokenizer(_Vocabulary(tokenizer, tokens))
        return _tries[tokenizer]
