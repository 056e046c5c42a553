"""From a request to what the engine is told about drawing its tokens. What does not fit is refused here."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence

from deepwright_core.engine import Grammar, SamplingParams, ThinkingControl

from .limits import Limits
from .protocol import GenerationRequest
from .refusal import Refusal
from .roster import Served


def answer_length(served: Served, limits: Limits, prompt: Sequence[int], wanted: int | None, field: str) -> int:
    """Most tokens of an answer to `prompt`; refuses a prompt or a wish (`wanted`) that does not fit.

    field: where the prompt stands in the request.
    """
    longest = min(limits.prompt_tokens or served.context, served.context - 1)
    if len(prompt) > longest:
        raise Refusal(
            400, f"The prompt has {len(prompt)} tokens; at most {longest} are possible. Shorten it.",
            param=field, code="context_length_exceeded",
        )  # fmt: skip
    left = served.context - len(prompt)
    most = min(limits.output_tokens or left, left)
    if wanted is not None and wanted > most:
        raise Refusal(
            400,
            f"max_tokens is {wanted}; beside a prompt of {len(prompt)} tokens, at most {most} are possible "
            f"(context {served.context}).",
            param="max_tokens", code="context_length_exceeded",
        )  # fmt: skip
    return min(limits.default_output_tokens, most) if wanted is None else wanted


def sampling_params(
    request: GenerationRequest,
    served: Served,
    max_tokens: int,
    *,
    stop_ids: Sequence[int] = (),
    bans: Sequence[int] = (),
    scores: int | None = None,
    prompt_scores: int | None = None,
    thinking: ThinkingControl | None = None,
    grammar: Grammar | None = None,
) -> list[SamplingParams]:
    """Sampling of each of a prompt's answers, which differ in their seeds.

    bans: tokens that are not to be drawn, whatever the request's own biases.
    """
    tokenizer = served.tokenizer
    biases = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
    for token in (*biases, *(request.stop_token_ids or ())):
        if token >= tokenizer.vocab_size:
            field = "logit_bias" if token in biases else "stop_token_ids"
            raise Refusal(400, f"{field} names token {token}; ids go up to {tokenizer.vocab_size - 1}.", param=field)
    if (request.min_tokens or 0) > max_tokens:
        raise Refusal(
            400, f"min_tokens is {request.min_tokens}; expected at most max_tokens, which is {max_tokens}.",
            param="min_tokens",
        )  # fmt: skip
    # The next turn is the user's to write.
    turn = () if tokenizer.user_id is None else (tokenizer.user_id,)
    seed = secrets.randbits(62) if request.seed is None else request.seed
    first = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(request.top_k or 0, 0),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        logit_bias=tuple((biases | dict.fromkeys(bans, BAN)).items()),
        stop_ids=(*turn, *stop_ids, *(request.stop_token_ids or ())),
        ignore_eos=bool(request.ignore_eos),
        scores=scores,
        prompt_scores=prompt_scores,
        thinking=thinking,
        grammar=grammar,
    )
    return [dataclasses.replace(first, seed=(seed + choice) % (1 << 63)) for choice in range(request.choices)]


# The strongest bias there is: OpenAI's for a token that is not to come.
BAN = -100.0
