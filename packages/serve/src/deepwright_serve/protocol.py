"""What goes over the wire: OpenAI's chat completions, completions and models, with DeepSeek's thinking fields.

Requests are strict (a string is no number) and closed (an unknown field is refused, not ignored), because a misspelt
`max_token` that does nothing is worse than an error. Fields of OpenAI's that this server cannot honour are named here
and accepted only with the value that asks for nothing. Left out: tools, structured output, log-probabilities,
penalties, logit bias, images and audio.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .limits import MAX_CHOICES, MAX_MESSAGES, MAX_PROMPTS, MAX_STOP_LENGTH, MAX_STOPS

NAME = Annotated[str, Field(min_length=1, max_length=256)]
STOP = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TOKEN = Annotated[int, Field(ge=0, lt=1 << 31)]
TOKENS = Annotated[list[TOKEN], Field(min_length=1)]


class Wire(BaseModel):
    """Base of what clients send."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# Requests -----------------------------------------------------------------------------------------


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


class StreamOptions(Wire):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class TextFormat(Wire):
    """The only response format there is."""

    type: Literal["text"]


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


# Replies ------------------------------------------------------------------------------------------


class CompletionTokensDetails(BaseModel):
    """Of the generated tokens, those that were thinking."""

    reasoning_tokens: int = 0


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those whose cache entries were already there."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request, with OpenAI's and DeepSeek's names for what was cached."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def count(cls, prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Usage:
        """All fields from the four numbers behind them."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_cache_hit_tokens=cached,
            prompt_cache_miss_tokens=prompt - cached,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning),
        )


FinishReason = Literal["stop", "length"]


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


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "deepwright"
    max_model_len: int


class ModelList(BaseModel):
    """GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """GET /health and GET /ready."""

    status: Literal["ok"] = "ok"
