"""Scores of tokens in the forms that clients know: OpenAI's for chat and for completions, vLLM's for prompts.

A token that is no whole character is written as its bytes, `bytes:\\xf0\\x9f`, so that it is told from others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deepwright_core.engine import TokenScore
from deepwright_core.tokenizer import Tokenizer

from .answer import Continuation, Scored
from .protocol.scores import Alternative, ChatLogprobs, PromptLogprob, PromptLogprobs, TextLogprobs, TokenLogprob

# JSON has no infinity; this is what OpenAI writes for a token that cannot be.
IMPOSSIBLE = -9999.0


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text: special tokens by their spelling, parts of characters by their bytes."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, IMPOSSIBLE)


def chat_logprobs(tokenizer: Tokenizer, scores: Iterable[Scored]) -> ChatLogprobs:
    """The tokens of a content."""

    def alternative(token_id: int, logprob: float) -> Alternative:
        text, data = token_text(tokenizer, token_id), list(tokenizer.token_bytes(token_id))
        return Alternative(token=text, logprob=_finite(logprob), bytes=data)

    content = []
    for score, _ in scores:
        chosen = alternative(score.token_id, score.logprob)
        top = [alternative(token_id, logprob) for token_id, logprob in score.top]
        content.append(TokenLogprob(token=chosen.token, logprob=chosen.logprob, bytes=chosen.bytes, top_logprobs=top))
    return ChatLogprobs(content=content)


def text_logprobs(
    tokenizer: Tokenizer, scores: Iterable[Scored], *, start: int = 0, prompt: TextLogprobs | None = None
) -> TextLogprobs:
    """The tokens of a continuation behind those of its prompt, if it is echoed. start: the characters before it."""
    logprobs = prompt or TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for score, offset in scores:
        _append(logprobs, tokenizer, score, start + offset)
    return logprobs


def echoed_logprobs(tokenizer: Tokenizer, prompt: Sequence[int], scores: Sequence[TokenScore]) -> TextLogprobs:
    """The tokens of a prompt; scores are those of all but its first, which nothing comes before."""
    first = TextLogprobs(
        tokens=[token_text(tokenizer, prompt[0])], token_logprobs=[None], top_logprobs=[None], text_offset=[0]
    )
    return text_logprobs(tokenizer, Continuation.of(tokenizer, prompt, (None, *scores)).scores, prompt=first)


def _append(logprobs: TextLogprobs, tokenizer: Tokenizer, score: TokenScore, offset: int) -> None:
    # Tokens may share a text; the better one, which comes first, is kept.
    top: dict[str, float] = {}
    for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
        top.setdefault(token_text(tokenizer, token_id), _finite(logprob))
    logprobs.tokens.append(token_text(tokenizer, score.token_id))
    logprobs.token_logprobs.append(_finite(score.logprob))
    logprobs.top_logprobs.append(top)
    logprobs.text_offset.append(offset)


def prompt_logprobs(tokenizer: Tokenizer, scores: Sequence[TokenScore]) -> PromptLogprobs:
    """The tokens of a prompt in vLLM's form."""
    entries: PromptLogprobs = [None]
    for score in scores:
        best = {
            str(token_id): PromptLogprob(
                logprob=_finite(logprob), rank=rank, decoded_token=token_text(tokenizer, token_id)
            )
            for rank, (token_id, logprob) in enumerate(score.top, 1)
        }
        if str(score.token_id) not in best:
            text = token_text(tokenizer, score.token_id)
            best[str(score.token_id)] = PromptLogprob(logprob=_finite(score.logprob), rank=None, decoded_token=text)
        entries.append(best)
    return entries
