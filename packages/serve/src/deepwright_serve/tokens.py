"""Texts and conversations as token ids, and back: what a client counts tokens with.

Both agree with the other routes: a prompt has the ids that a completion would see, a conversation those of an answer.
"""

from __future__ import annotations

from .prompt import chat_prompt
from .protocol import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest
from .refusal import Refusal
from .roster import Served
from .scores import token_text


def to_tokens(served: Served, request: TokenizeRequest) -> TokenizeReply:
    """POST /tokenize."""
    tokenizer = served.tokenizer
    if request.messages is None:
        begin = () if request.add_special_tokens is False else tokenizer.begin_ids
        ids = [*begin, *tokenizer.encode(request.prompt or "")]
    else:
        ids = chat_prompt(
            tokenizer,
            request.messages,
            tools=request.tools or (),
            thinking=request.thinking_mode,
            add_generation_prompt=request.add_generation_prompt,
        )
    texts = [token_text(tokenizer, token) for token in ids] if request.return_token_strs else None
    return TokenizeReply(count=len(ids), max_model_len=served.context, tokens=ids, token_strs=texts)


def to_text(served: Served, request: DetokenizeRequest) -> DetokenizeReply:
    """POST /detokenize."""
    highest = max(request.tokens, default=0)
    if highest >= served.tokenizer.vocab_size:
        raise Refusal(
            400, f"tokens holds {highest}; ids go up to {served.tokenizer.vocab_size - 1}.",
            param="tokens", code="invalid_value",
        )  # fmt: skip
    return DetokenizeReply(prompt=served.tokenizer.decode(request.tokens, skip_special=False))
