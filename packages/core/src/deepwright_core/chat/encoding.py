"""From a conversation to ids, through pieces; and for training, which of them the assistant wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import RequestError
from .conversation import Messages, Thinking, Tools, conversation
from .form import form_pieces, is_ours
from .piece import Piece
from .template import template_pieces

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer


def pieces(
    tokenizer: Tokenizer,
    messages: Messages,
    *,
    tools: Tools | None = None,
    thinking: Thinking = "auto",
    add_generation_prompt: bool = True,
) -> list[Piece]:
    """A conversation in order, in the tokenizer's own template or in deepwright's chat form."""
    if thinking not in ("auto", "enabled", "disabled"):
        raise RequestError(f"thinking is {thinking!r}; expected auto, enabled or disabled.")
    ours = is_ours(tokenizer.conventions.template)
    write = form_pieces if ours else template_pieces
    return write(tokenizer, *conversation(messages, tools), thinking, add_generation_prompt)


def encode_pieces(tokenizer: Tokenizer, forms: Sequence[Sequence[Piece]]) -> list[list[list[int]]]:
    """Ids of each piece of each form, with all texts encoded in one batch."""
    special = dict.fromkeys(piece.special for form in forms for piece in form if piece.special is not None)
    missing = [token for token in special if token not in tokenizer.control]
    if missing:
        raise RequestError(lacking(missing))
    texts = [[_text(tokenizer, form, number) for number in range(len(form))] for form in forms]
    # Only a template without a token for begin starts with text.
    first = iter(tokenizer.encode_batch([words[0] for words in texts if words and words[0] is not None]))
    inside = [text for words in texts for text in words[1:] if text is not None]
    rest = iter(tokenizer.encode_batch(inside, inside=True))
    return [
        [
            [tokenizer.control[piece.special].id] if piece.special is not None else next(rest if number else first)
            for number, piece in enumerate(form)
        ]
        for form in forms
    ]


def _text(tokenizer: Tokenizer, form: Sequence[Piece], number: int) -> str | None:
    """The text of a piece, less what the tokens beside it swallow; None for a special token."""
    piece = form[number]
    if piece.special is not None:
        return None
    text = piece.text
    before = form[number - 1].special if number else None
    after = form[number + 1].special if number + 1 < len(form) else None
    if before is not None and tokenizer.control[before].rstrip:
        text = text.lstrip()
    if after is not None and tokenizer.control[after].lstrip:
        text = text.rstrip()
    return text


def encode_with_mask(
    tokenizer: Tokenizer, messages: Messages, *, tools: Tools | None = None
) -> tuple[list[int], list[bool]]:
    """Ids of a finished conversation, and for each whether the assistant wrote it (its end token included).

    Supervised training learns only from the tokens whose mask is true: answers, thinking and calls of tools.
    """
    return encode_many_with_mask(tokenizer, [messages], tools=[tools])[0]


def encode_many_with_mask(
    tokenizer: Tokenizer, conversations: Sequence[Messages], *, tools: Sequence[Tools | None] | None = None
) -> list[tuple[list[int], list[bool]]]:
    """`encode_with_mask` of each conversation, with all texts encoded in one batch: many times faster.

    tools: of each conversation.
    """
    if not is_ours(tokenizer.conventions.template):
        raise RequestError(
            "The tokenizer has a chat template of its own, which does not say what the assistant wrote; training "
            "examples are written in deepwright's chat form: take Tokenizer.with_chat_form()."
        )
    forms = [
        pieces(tokenizer, messages, tools=given, add_generation_prompt=False)
        for messages, given in zip(conversations, tools or [None] * len(conversations), strict=True)
    ]
    encoded = []
    for form, ids in zip(forms, encode_pieces(tokenizer, forms), strict=True):
        mask = [piece.learn for piece, new in zip(form, ids, strict=True) for _ in new]
        encoded.append(([i for new in ids for i in new], mask))
    return encoded


def lacking(tokens: Sequence[str]) -> str:
    """What to say of a tokenizer that has not got special tokens which the chat form needs."""
    return (
        f"The tokenizer has no {', '.join(tokens)}, which deepwright's chat form is written with. Train a model with "
        "tokenizer=file, which adds such tokens, or put the model's own chat_template.jinja beside its tokenizer.json."
    )


def opens_thinking(tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    """Whether a prompt ends inside of a thought that it has opened: what follows is thinking from its first token."""
    for i in reversed(prompt):
        if i == tokenizer.think_start_id:
            return True
        if i == tokenizer.think_end_id or i == tokenizer.user_id or i in tokenizer.end_ids:
            return False
    return False
