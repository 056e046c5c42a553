"""What requests for chat and for plain completions share: sampling, length, stops, form and streaming.

OpenAI's fields, and those of vLLM's extra ones (`top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`,
`stop_token_ids`, `structured_outputs`, `prompt_logprobs`) that clients send as `extra_body`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..limits import MAX_BIASES, MAX_CHOICES, MAX_LOGPROBS, MAX_STOPS
from .structured import CHOICES, REGEX, SCHEMA, StructuredOutputs
from .wire import NAME, STOP, TOKEN, Wire, Wrong

FinishReason = Literal["stop", "length"]


class StreamOptions(Wire):
    """Options of a streamed answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None


class GenerationRequest(Wire):
    """What both kinds of request share."""

    model: NAME
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)
    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    stop: STOP | Annotated[list[STOP], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TOKEN], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    structured_outputs: StructuredOutputs | None = None
    guided_json: SCHEMA | Annotated[str, Field(min_length=1)] | None = None
    guided_regex: REGEX | None = None
    guided_choice: CHOICES | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted because clients send it; it changes nothing that this server does.
    user: Annotated[str, Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise Wrong("stream_options", "is only allowed together with stream: true.")
        if self.prompt_logprobs is not None and self.stream:
            raise Wrong("prompt_logprobs", "is not possible together with stream: true.")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return 1 if self.n is None else self.n

    @property
    def usage_in_stream(self) -> Literal["never", "last", "always"]:
        """Which chunks of a stream carry the usage."""
        if self.stream_options is None or not self.stream_options.include_usage:
            return "never"
        return "always" if self.stream_options.continuous_usage_stats else "last"
