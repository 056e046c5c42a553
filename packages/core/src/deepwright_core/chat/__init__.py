"""The chat form: how a conversation becomes tokens, and how what a model wrote is taken apart.

    BOS [system] [tools] <｜User｜>question<｜Assistant｜>[<think>thinking</think>]answer[calls] EOS [outputs]answer EOS

`form` has this as structure and as the Jinja text that travels with the model. A tokenizer that came with a template of
its own is used with that one (`template`). Both ways give `Piece`s, special tokens and plain text apart, so that nobody
can write a special token into a message and have it count (`encoding`). Left out: images, prefilled answers.
"""

from __future__ import annotations

from .conversation import Thinking
from .encoding import encode_many_with_mask, encode_pieces, encode_with_mask, lacking, opens_thinking, pieces
from .form import CHAT_TEMPLATE, is_ours
from .piece import Piece
from .reply import Reply, ToolCall, parse_reply
from .template import render

__all__ = [
    "CHAT_TEMPLATE",
    "Piece",
    "Reply",
    "Thinking",
    "ToolCall",
    "encode_many_with_mask",
    "encode_pieces",
    "encode_with_mask",
    "is_ours",
    "lacking",
    "opens_thinking",
    "parse_reply",
    "pieces",
    "render",
]
