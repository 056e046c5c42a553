"""POST /v1/completions: plain continuation of text or of token ids, and scores of what is given.

Left out: `suffix` (the models are not trained to fill in) and `best_of` (ask for `n` and choose).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ..limits import MAX_LOGPROBS, MAX_PROMPTS
from .generation import FinishReason, GenerationRequest
from .scores import PromptLogprobs, TextLogprobs
from .structured import RESPONSE_FORMAT
from .usage import Usage
from .wire import TOKENS, Wrong, left_out_when_none


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: (
        str
        | TOKENS
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TOKENS], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    # 0, together with echo: only look at the prompt.
    max_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: RESPONSE_FORMAT | None = None
    # Accepted only with the value that asks for nothing.
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _countable(cls, body: Any) -> Any:
        """Too many prompts, said once: the forms of `prompt` would each complain of something else."""
        prompts = body.get("prompt") if isinstance(body, dict) else None
        if isinstance(prompts, list) and len(prompts) > MAX_PROMPTS and isinstance(prompts[0], str | list):
            raise Wrong("prompt", f"holds {len(prompts)} prompts; at most {MAX_PROMPTS} are possible in one request.")
        return body

    @model_validator(mode="after")
    def _possible(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.choices:
            raise Wrong("best_of", f"is {self.best_of}; answers are not ranked here: ask for n and choose.")
        if self.suffix:
            raise Wrong("suffix", "is not possible: the model continues text and does not fill in.")
        if self.max_tokens == 0 and not self.echo:
            raise Wrong("max_tokens", "is 0, which is only possible together with echo: true.")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


# Replies ------------------------------------------------------------------------------------------


class TextChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=left_out_when_none)


class CompletionReply(BaseModel):
    """A whole completion, or one event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
