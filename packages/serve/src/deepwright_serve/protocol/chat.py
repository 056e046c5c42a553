"""POST /v1/chat/completions: the request, the whole reply, and the chunks of a streamed one.

OpenAI's form with DeepSeek's thinking. Fields of OpenAI's that this server cannot honour are named here and accepted
only with the value that asks for nothing. Left out: tools, structured output, log-probabilities, images and audio.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ..limits import MAX_MESSAGES
from .generation import FinishReason, GenerationRequest
from .usage import Usage
from .wire import Wire


class TextPart(Wire):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


class Message(Wire):
    """One turn. `reasoning_content` (or `reasoning`) may come back from an earlier answer; it is not shown again."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
    name: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Thinking(Wire):
    """DeepSeek's switch: whether the model thinks before it answers."""

    type: Literal["enabled", "disabled", "auto"]


class TextFormat(Wire):
    """The only response format there is."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    parallel_tool_calls: bool | None = None
    # Accepted only with the value that asks for nothing.
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them.")
        return self

    @model_validator(mode="after")
    def _order_of_turns(self) -> ChatRequest:
        roles = [message.role for message in self.messages]
        opening = next((i for i, role in enumerate(roles) if role in ("user", "assistant")), len(roles))
        if any(role in ("system", "developer") for role in roles[opening:]):
            raise ValueError("messages holds a system message after the conversation began; put it first.")
        if roles[-1] != "user":
            raise ValueError(f"messages ends with role '{roles[-1]}'; the last message must be the user's.")
        return self

    @property
    def length(self) -> int | None:
        """The most tokens wanted, under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def thinking_mode(self) -> Literal["auto", "enabled", "disabled"]:
        """`thinking` when given, else what `reasoning_effort` implies."""
        if self.thinking is not None:
            return self.thinking.type
        if self.reasoning_effort is None:
            return "auto"
        return "disabled" if self.reasoning_effort == "none" else "enabled"


class AnswerMessage(BaseModel):
    """The assistant's turn. Thinking comes under both names that clients look for; null when there was none."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: None = None


class ChatReply(BaseModel):
    """A whole chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class AnswerDelta(BaseModel):
    """What a chunk adds to an answer; fields that it leaves out are unchanged."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class ChunkChoice(BaseModel):
    """One answer's part of a chunk."""

    index: int
    delta: AnswerDelta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
