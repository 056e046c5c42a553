"""How long an answer thinks: what `thinking` and `reasoning_effort` mean in tokens."""

from __future__ import annotations

from deepwright_core.engine import ThinkingControl
from deepwright_core.tokenizer import Tokenizer

from .protocol import ChatRequest
from .refusal import Refusal

# Of max_tokens, the share that thinking may take: the rest is left for the answer.
EFFORTS = {"minimal": 0.1, "low": 0.2, "medium": 0.5, "high": 0.8, "xhigh": 0.95}
# Stands in the place of an end of thinking that comes too early.
GO_ON = "\nWait, "


def thinking_control(
    request: ChatRequest, tokenizer: Tokenizer, *, opened: bool, max_tokens: int, formed: bool
) -> ThinkingControl | None:
    """The bounds that a request sets to its thinking; None when there is nothing to control.

    opened: whether the prompt ends inside of a thought. max_tokens: of the whole answer. formed: whether the answer
    keeps to a grammar, which begins only when the thinking has ended.
    """
    switch = request.thinking
    budget = None if switch is None else switch.budget_tokens
    least = 0 if switch is None else switch.min_tokens or 0
    if budget is None and request.reasoning_effort in EFFORTS:
        budget = max(int(EFFORTS[request.reasoning_effort] * max_tokens), least)
    bounded = budget is not None or least > 0
    if request.thinking_mode == "disabled" or (request.continues is not None and not opened):
        return None
    if not bounded and (not formed or tokenizer.think_end_id is None):
        return None
    if tokenizer.think_end_id is None:
        raise Refusal(
            400, "This model's tokenizer has no mark that ends thinking, so a budget cannot be kept; leave it out.",
            param="thinking" if switch is not None else "reasoning_effort",
        )  # fmt: skip
    return ThinkingControl(
        end_id=tokenizer.think_end_id,
        opened=opened,
        budget=budget,
        least=least,
        continuation=tuple(tokenizer.encode_batch([GO_ON], inside=True)[0]) if least else (),
        start_id=None if opened else tokenizer.think_start_id,
    )
