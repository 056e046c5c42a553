"""Every bound of the server in one place: sizes, lengths, queues and times.

A request that passes a bound is answered with a 4xx and a sentence; nothing grows without one of these.
Bounds that belong to a single field (temperature, n) stand beside it in `protocol`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

MAX_CHOICES = 16
MAX_MESSAGES = 1024
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_BIASES = 1024
# As many alternatives as OpenAI gives.
MAX_LOGPROBS = 20
MAX_TOOLS = 128
MAX_CALLS = 128
MAX_REGEX_LENGTH = 4096
MAX_CHOICES_OF_FORM = 1024
MAX_CHOICE_LENGTH = 1024
MAX_WAITING_FORMS = 32


class Limits(BaseModel):
    """Bounds that whoever runs the server may choose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    body_bytes: int = Field(default=1 << 20, ge=1024, le=1 << 28, description="largest request body")
    body_seconds: float = Field(default=30.0, gt=0, description="time a client has to send its body")
    header_bytes: int = Field(default=1 << 14, ge=1024, le=1 << 16, description="largest head of a request")
    header_seconds: float = Field(default=30.0, gt=0, description="time a client has to send a request's head")
    prompt_tokens: int | None = Field(
        default=None, ge=1, description="longest prompt (default: what the model can take)"
    )
    output_tokens: int | None = Field(
        default=None, ge=1, description="most tokens of one answer (default: as for prompts)"
    )
    default_output_tokens: int = Field(
        default=1024, ge=1, description="most tokens of an answer, where no max_tokens is given"
    )
    running: int = Field(default=64, ge=1, le=4096, description="answers generated at the same time")
    waiting: int = Field(default=256, ge=0, le=65536, description="answers that may wait; more are refused with 429")
    queue_seconds: float = Field(default=120.0, gt=0, description="longest time that an answer waits for its turn")
    request_seconds: float = Field(default=600.0, gt=0, description="deadline of a request, waiting included")
    health_seconds: float = Field(default=10.0, gt=0, description="deadline within which /health must see a token")
    stalled_seconds: float = Field(default=60.0, gt=0, description="longest time that a client may read nothing")
    drain_seconds: float = Field(default=20.0, gt=0, description="time that running requests have after SIGTERM")
    connections: int = Field(default=2048, ge=1, description="connections open at the same time")
