"""The chat form: how a conversation becomes tokens.

    BOS [system] <｜User｜>question<｜Assistant｜>[<think>thinking</think>]answer EOS

The same form exists twice on purpose. `CHAT_TEMPLATE` is Jinja text that travels with the model, for other programs.
`pieces` is the form as structure: special tokens and plain text apart, so that nobody can write a special token into
a message and have it count. A test holds the two together.

A prompt ends in <｜Assistant｜> ("auto": the model decides whether to think), or in <think> ("enabled"), or in
<think></think> ("disabled"). Earlier assistant turns lose their thinking; only a conversation's last turn, as
training sees it, keeps it. Left out: tools, images, prefilled answers.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import RequestError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Thinking = Literal["auto", "enabled", "disabled"]
Special = Literal["bos", "eos", "user", "assistant", "think_start", "think_end"]
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = """\
{%- if thinking is not defined or thinking is none %}{% set thinking = 'auto' %}{% endif -%}
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{{- bos_token -}}
{%- set first = namespace(system=true) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- if not first.system %}{{ '\\n\\n' }}{% endif -%}
{%- set first.system = false -%}
{{- message['content'] -}}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<｜Assistant｜>' -}}
{%- if loop.last and not add_generation_prompt -%}
{%- if message['reasoning_content'] is defined and message['reasoning_content'] -%}
{{- '<think>' + message['reasoning_content'] + '</think>' -}}
{%- endif -%}
{{- message['content'] -}}
{%- else -%}
{{- message['content'].split('</think>')[-1] -}}
{%- endif -%}
{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<｜Assistant｜>' -}}
{%- if thinking == 'enabled' or thinking is sameas true %}{{ '<think>' }}
{%- elif thinking == 'disabled' or thinking is sameas false %}{{ '<think></think>' }}{% endif -%}
{%- endif -%}
"""


@dataclass(frozen=True)
class Piece:
    """A part of a conversation: a special token by name, or plain text. `learn`: the assistant wrote it."""

    special: Special | None = None
    text: str = ""
    learn: bool = False

    def ids(self, tokenizer: Tokenizer) -> list[int]:
        if self.special is None:
            return tokenizer.encode(self.text)
        return [getattr(tokenizer, f"{self.special}_id")]


def check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what is not a conversation, with one sentence for each problem."""
    problems = []
    if not messages:
        problems.append("messages is empty; expected at least one message.")
    for n, message in enumerate(messages):
        if message.get("role") not in ROLES:
            problems.append(f"messages[{n}].role is {message.get('role')!r}; expected system, user or assistant.")
        if not isinstance(message.get("content"), str):
            problems.append(f"messages[{n}].content is {type(message.get('content')).__name__}; expected text.")
        if not isinstance(message.get("reasoning_content") or "", str):
            problems.append(f"messages[{n}].reasoning_content is not text; expected text or nothing.")
    if problems:
        raise RequestError(problems)


def pieces(
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: Thinking = "auto",
    add_generation_prompt: bool = True,
) -> list[Piece]:
    """The chat form of a conversation, in order."""
    check(messages)
    if thinking not in ("auto", "enabled", "disabled"):
        raise RequestError(f"thinking is {thinking!r}; expected auto, enabled or disabled.")
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    form = [Piece("bos"), Piece(text=system)]
    for n, message in enumerate(messages):
        if message["role"] == "user":
            form += [Piece("user"), Piece(text=message["content"])]
        elif message["role"] == "assistant":
            form.append(Piece("assistant"))
            content = message["content"]
            if n == len(messages) - 1 and not add_generation_prompt:
                if message.get("reasoning_content"):
                    form += [
                        Piece("think_start", learn=True),
                        Piece(text=message["reasoning_content"], learn=True),
                        Piece("think_end", learn=True),
                    ]
            else:
                content = content.split("</think>")[-1]
            form += [Piece(text=content, learn=True), Piece("eos", learn=True)]
    if add_generation_prompt:
        form.append(Piece("assistant"))
        if thinking != "auto":
            form.append(Piece("think_start"))
        if thinking == "disabled":
            form.append(Piece("think_end"))
    return form


def encode_with_mask(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """Ids of a finished conversation, and for each whether the assistant wrote it (its end token included).

    Supervised training learns only from the tokens whose mask is true.
    """
    ids: list[int] = []
    mask: list[bool] = []
    for piece in pieces(messages, add_generation_prompt=False):
        new = piece.ids(tokenizer)
        ids += new
        mask += [piece.learn] * len(new)
    return ids, mask


def encode_many_with_mask(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Mapping[str, Any]]]
) -> list[tuple[list[int], list[bool]]]:
    """`encode_with_mask` of each conversation, with all texts encoded in one batch: many times faster."""
    forms = [pieces(messages, add_generation_prompt=False) for messages in conversations]
    texts = iter(tokenizer.encode_batch([piece.text for form in forms for piece in form if piece.special is None]))
    encoded = []
    for form in forms:
        ids: list[int] = []
        mask: list[bool] = []
        for piece in form:
            new = next(texts) if piece.special is None else piece.ids(tokenizer)
            ids += new
            mask += [piece.learn] * len(new)
        encoded.append((ids, mask))
    return encoded


# What a model wrote ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """A completion taken apart.

    thinking: what stands in <think>…</think>; None when the model did not think.
    answer: what comes after; "" when the thinking never ended.
    well_formed: ended with the end token, and thinking, if any, opened first and closed exactly once.
    """

    thinking: str | None
    answer: str
    well_formed: bool


def parse_reply(tokenizer: Tokenizer, ids: Sequence[int], *, opened: bool = False) -> Reply:
    """Take a completion apart by its ids, not by its text. `opened`: the prompt already ended in <think>."""
    ids = list(ids)
    finished = bool(ids) and ids[-1] == tokenizer.eos_id
    body = ids[:-1] if finished else ids
    starts = [n for n, i in enumerate(body) if i == tokenizer.think_start_id]
    ends = [n for n, i in enumerate(body) if i == tokenizer.think_end_id]
    strays = any(i in tokenizer.special_ids for n, i in enumerate(body) if n not in starts and n not in ends)
    expected_starts = [] if opened else [0]
    if not starts and not ends and not opened:
        return Reply(None, tokenizer.decode(body), finished and not strays)
    if not ends:
        return Reply(tokenizer.decode(body), "", False)
    thinking, answer = body[: ends[0]], body[ends[-1] + 1 :]
    right = starts == expected_starts and len(ends) == 1 and not strays
    return Reply(tokenizer.decode(thinking), tokenizer.decode(answer), finished and right)


# Jinja ----------------------------------------------------------------------------------------------


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: Thinking = "auto",
    add_generation_prompt: bool = True,
) -> str:
    """The tokenizer's Jinja template as text, in a sandbox: what other programs see. Not safe to encode as it is."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    check(messages)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(tokenizer.template).render(
            messages=[dict(message) for message in messages],
            bos_token=tokenizer.bos,
            eos_token=tokenizer.eos,
            pad_token=tokenizer.pad,
            thinking=thinking,
            enable_thinking=thinking != "disabled",
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template may fail in any way that Python can
        raise RequestError(f"The chat template refuses this conversation: {error}.") from error


def render_apart(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: Thinking = "auto",
    add_generation_prompt: bool = True,
) -> list[tuple[str, bool]]:
    """Render any template with (text, is it a message's own text) kept apart.

    Each message's text is replaced by a random mark before rendering and put back afterwards, so that a foreign
    template works and still no message can smuggle in a special token.
    """
    nonce = secrets.token_hex(8)
    texts: dict[str, str] = {}

    def mark(text: Any) -> Any:
        if not isinstance(text, str) or not text.strip():
            return text
        texts[f"\ue000{nonce}.{len(texts)}\ue001"] = text
        return list(texts)[-1]

    marked = [{key: value if key == "role" else mark(value) for key, value in message.items()} for message in messages]
    rest = render(tokenizer, marked, thinking=thinking, add_generation_prompt=add_generation_prompt)
    parts: list[tuple[str, bool]] = []
    while (start := rest.find(f"\ue000{nonce}.")) >= 0:
        end = rest.index("\ue001", start) + 1
        parts += [(rest[:start], False), (texts[rest[start:end]], True)]
        rest = rest[end:]
    return [*parts, (rest, False)]
