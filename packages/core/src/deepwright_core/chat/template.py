"""Chat templates in Jinja, as models bring them: rendered in a sandbox, with the names and filters that transformers
gives them, and taken apart again into special tokens and text.

A template may trim, split and quote what messages say, so the text itself goes through it. What in a message looks like
a control token is put between random numbers first; behind the template, a control token without them is the
template's own. Where nothing looks like one, this changes nothing; where something does, white space beside it may stay
that the template would have trimmed. A template that deletes from the middle of a message, so that what is left joins
to a control token, is beyond this.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as loop_controls
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import RequestError
from .conversation import Messages, Thinking, Tools, conversation
from .form import CHAT_TEMPLATE
from .piece import Piece

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer


def render(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    thinking: Thinking = "auto",
    add_generation_prompt: bool = True,
) -> str:
    """The tokenizer's chat template as text: what other programs see. Not safe to encode as it is."""
    return _render(tokenizer, *conversation(messages, tools), thinking, add_generation_prompt)


def template_pieces(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    thinking: Thinking,
    add_generation_prompt: bool,
) -> list[Piece]:
    """A conversation (as `conversation` gives it) in the tokenizer's own template."""
    known = _known(tuple(tokenizer.control))
    marks = _Marks(*(_nonce(tokenizer) for _ in range(3)))

    def guard(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {known.guard(key, marks, inside=False): guard(inner, key) for key, inner in value.items()}
        if isinstance(value, list):
            return [guard(inner) for inner in value]
        # Templates look things up by their names, and compare types.
        return known.guard(value, marks, inside=name != "type") if isinstance(value, str) else value

    guarded = [{k: v if k == "role" else guard(v, k) for k, v in message.items()} for message in messages]
    text = _render(tokenizer, guarded, guard(tools), thinking, add_generation_prompt)
    parts = re.split(f"({'|'.join(marks)})", text)  # text, mark, text, mark, …, text
    form: list[Piece] = []
    words = ""
    for number in range(0, len(parts), 2):
        part = parts[number]
        around = (*parts[max(number - 1, 0) : number], *parts[number + 1 : number + 2])
        if around == (marks.before, marks.behind) and known.pattern.fullmatch(part):
            words, part = words + part, ""  # a message said it
        place = 0
        for found in known.pattern.finditer(part):
            form += [Piece(text=words + part[place : found.start()]), Piece(found[0])]
            words, place = "", found.end()
        words += part[place:]
    return [piece for piece in (*form, Piece(text=words)) if piece.special or piece.text]


def _nonce(tokenizer: Tokenizer) -> str:
    """Something that nobody can guess, and that the template's filters leave alone: digits have no other case and need
    no quoting, and those that the template does not write are not what it replaces."""
    written = f"{tokenizer.conventions.template}{tokenizer.conventions.tool_template}"
    digits = [digit for digit in "0123456789" if digit not in written]
    return "".join(secrets.choice(digits if len(digits) > 1 else "0123456789") for _ in range(100))


class _Marks(NamedTuple):
    """What stands before and behind a control token that a message says, and what keeps a part of one apart."""

    before: str
    behind: str
    apart: str


@dataclass(frozen=True)
class _Known:
    """Control tokens, and the parts of them that a text could bring to complete one with what stands beside it."""

    tokens: tuple[str, ...]
    pattern: re.Pattern[str]
    beginnings: frozenset[str]
    endings: frozenset[str]

    def guard(self, text: str, marks: _Marks, *, inside: bool) -> str:
        """A text with marks around each control token, and where it has such a part at its beginning or end, or
        (inside) is one altogether."""
        if not text:
            return text
        guarded = self.pattern.sub(lambda found: f"{marks.before}{found[0]}{marks.behind}", text)
        lengths = range(1, min(len(self.tokens[0]) if self.tokens else 0, len(text) + 1))
        within = inside and len(text) in lengths and any(text in token for token in self.tokens)
        if within or any(text[:n] in self.endings for n in lengths):
            guarded = marks.apart + guarded
        if any(text[-n:] in self.beginnings for n in lengths):
            guarded += marks.apart
        return guarded


@lru_cache(maxsize=16)
def _known(control: tuple[str, ...]) -> _Known:
    tokens = tuple(sorted(control, key=len, reverse=True))
    return _Known(
        tokens,
        re.compile("|".join(map(re.escape, tokens)) or r"(?!)"),
        frozenset(token[:n] for token in tokens for n in range(1, len(token))),
        frozenset(token[-n:] for token in tokens for n in range(1, len(token))),
    )


def _render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    thinking: Thinking,
    add_generation_prompt: bool,
) -> str:
    conventions = tokenizer.conventions
    source = conventions.tool_template if tools and conventions.tool_template else conventions.template
    # Families differ in what they call the switch; none of them knows "auto", which is not to turn it.
    switch = {} if thinking == "auto" else dict.fromkeys(("thinking", "enable_thinking"), thinking == "enabled")
    try:
        return _compiled(CHAT_TEMPLATE if source is None else source).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **conventions.names,
            **switch,
        )
    except Exception as error:  # a template may fail in any way that Python can
        raise RequestError(f"The chat template refuses this conversation: {error}.") from error


# What templates may use --------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loop_controls]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _Mappings(),
        "namespace": _Namespace,
    }
    return environment


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: around what the assistant writes. It changes nothing in the text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Namespace(Namespace):
    """Without names that begin with an underscore: they lead into Python's own."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        given = dict(*rest, **values)
        for name in given:
            _refuse_hidden(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace must not hold {name!r}")


class _Mappings:
    """`dict(…)` and `dict.fromkeys(…)`, and nothing else of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own filter, which writes HTML entities.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
