"""What requests for chat and for plain completions share: sampling, length, stops and streaming."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ..limits import MAX_CHOICES, MAX_STOPS
from .wire import NAME, STOP, Wire

FinishReason = Literal["stop", "length"]


class StreamOptions(Wire):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationRequest(Wire):
    """What both kinds of request share: sampling, length, stops and streaming."""

    model: NAME
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 20)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    stop: STOP | Annotated[list[STOP], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Accepted because clients send them; they change nothing that this server does.
    user: Annotated[str, Field(max_length=1024)] | None = None
    # Accepted only with the value that asks for nothing.
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed together with stream: true.")
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
    def wants_usage(self) -> bool:
        """Whether the last chunk of a stream carries the usage."""
        return self.stream_options is not None and self.stream_options.include_usage
