"""POST /v1/completions: plain continuation of text or of token ids. Left out: log-probabilities, echo, suffix."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from ..limits import MAX_PROMPTS
from .generation import FinishReason, GenerationRequest
from .usage import Usage
from .wire import TOKENS


class CompletionRequest(GenerationRequest):
    """POST /v1/completions: plain continuation of text or of token ids."""

    prompt: (
        str
        | TOKENS
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TOKENS], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    # Accepted only with the value that asks for nothing.
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: None = None


class CompletionReply(BaseModel):
    """A whole completion, or one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
