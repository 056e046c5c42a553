"""POST /v1/chat/completions: the request, the whole reply, and the chunks of a streamed one.

OpenAI's form with DeepSeek's thinking. Left out: images and audio, in either direction, and web search.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from ..limits import MAX_CALLS, MAX_LOGPROBS, MAX_MESSAGES
from .generation import GenerationRequest
from .scores import ChatLogprobs, PromptLogprobs
from .structured import RESPONSE_FORMAT
from .tools import TOOL_CHOICE, TOOLS, EarlierCall, NamedTool, ToolCall, ToolCallPiece
from .usage import Usage
from .wire import Wire, Wrong, left_out_when_none

# Messages -----------------------------------------------------------------------------------------


class TextPart(Wire):
    """A piece of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


CONTENT = str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
SPEAKER = Annotated[str, Field(max_length=256)]


def text_of(content: str | list[TextPart] | None) -> str:
    """A content as one string."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


class SystemMessage(Wire):
    """What the model is told before the conversation."""

    role: Literal["system", "developer"]
    content: CONTENT
    name: SPEAKER | None = None


class UserMessage(Wire):
    """What the user says."""

    role: Literal["user"]
    content: CONTENT
    name: SPEAKER | None = None


class AssistantMessage(Wire):
    """An earlier answer; or, as the last message and with `prefix`, the beginning of the one to come.

    `reasoning_content` (or `reasoning`) of an earlier answer is not shown again; of a prefix it is.
    """

    role: Literal["assistant"]
    content: CONTENT | None = None
    name: SPEAKER | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[EarlierCall], Field(max_length=MAX_CALLS)] | None = None
    prefix: bool | None = None
    # What the official client's parse() made of the content, which it sends back; the content says the same.
    parsed: Any = None
    # What clients send back from an answer; accepted only where it says nothing.
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    @property
    def thought(self) -> str:
        """The thinking, under either of its names."""
        return self.reasoning_content or self.reasoning or ""

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls and not (self.prefix and self.thought):
            raise Wrong("content", "is missing; an assistant's message holds content, tool_calls or both.")
        return self


class ToolMessage(Wire):
    """What a called function gave."""

    role: Literal["tool"]
    content: CONTENT
    tool_call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: SPEAKER | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]

# Request ------------------------------------------------------------------------------------------


class ThinkingSwitch(Wire):
    """Whether the model thinks before it answers, and how long.

    `budget_tokens`: after so many tokens of thinking, its end is forced. `min_tokens`: an end that comes before so many
    is replaced by a word that makes it go on.
    """

    type: Literal["enabled", "disabled", "auto"]
    budget_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)

    @model_validator(mode="after")
    def _possible(self) -> ThinkingSwitch:
        if self.type == "disabled" and (self.budget_tokens or self.min_tokens):
            raise Wrong("type", "is disabled, and budget_tokens or min_tokens asks for thinking; leave them out.")
        if self.budget_tokens is not None and (self.min_tokens or 0) > self.budget_tokens:
            raise Wrong("min_tokens", f"is {self.min_tokens}; expected at most budget_tokens, {self.budget_tokens}.")
        return self


class TemplateOptions(Wire):
    """vLLM's way of turning thinking on and off."""

    thinking: bool | None = None
    enable_thinking: bool | None = None

    @property
    def mode(self) -> Literal["auto", "enabled", "disabled"]:
        """What they ask for."""
        switch = self.thinking if self.thinking is not None else self.enable_thinking
        return "auto" if switch is None else "enabled" if switch else "disabled"


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    thinking: ThinkingSwitch | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: TemplateOptions | None = None
    tools: TOOLS | None = None
    tool_choice: TOOL_CHOICE | None = None
    parallel_tool_calls: bool | None = None
    response_format: RESPONSE_FORMAT | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    # Accepted because clients send them; they change nothing that this server does.
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    store: bool | None = None
    service_tier: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: Annotated[str, Field(max_length=1024)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None
    # Accepted only with the value that asks for nothing.
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> ChatRequest:
        lengths = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise Wrong("max_tokens", "and max_completion_tokens differ; give one of them.")
        return self

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise Wrong("top_logprobs", "is only allowed together with logprobs: true.")
        return self

    @model_validator(mode="after")
    def _choice_needs_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise Wrong("tools", f"names {', '.join(twice)} more than once; give each function a name of its own.")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise Wrong(
                "tool_choice",
                f"names '{self.tool_choice.function.name}', which is not among the tools: "
                f"{', '.join(names) or 'there are none'}.",
            )
        if self.tool_choice == "required" and not names:
            raise Wrong("tool_choice", "is required, and there are no tools to choose from.")
        return self

    @model_validator(mode="after")
    def _order_of_turns(self) -> ChatRequest:
        roles = [message.role for message in self.messages]
        opening = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
        if any(role in ("system", "developer") for role in roles[opening:]):
            raise Wrong("messages", "holds a system message after the conversation began; put it first.")
        if any(isinstance(message, AssistantMessage) and message.prefix for message in self.messages[:-1]):
            raise Wrong("messages", "holds a prefix that is not the last message; only the last can be continued.")
        if self.continues is None and roles[-1] not in ("user", "tool"):
            raise Wrong(
                "messages",
                f"ends with role '{roles[-1]}'; the last message must be the user's or a tool's, or an assistant's "
                "with prefix: true.",
            )
        return self

    @model_validator(mode="after")
    def _continuing(self) -> ChatRequest:
        if self.continue_final_message and (self.add_generation_prompt or self.messages[-1].role != "assistant"):
            raise Wrong(
                "continue_final_message",
                "needs an assistant's message at the end, and add_generation_prompt: false.",
            )
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise Wrong("add_generation_prompt", "may be false only together with continue_final_message.")
        if self.continues is not None and self.continues.tool_calls:
            raise Wrong("messages", "ends with an assistant's message that calls tools; such a turn has ended.")
        return self

    @property
    def continues(self) -> AssistantMessage | None:
        """The message whose text the answer goes on with, if one is to be continued."""
        last = self.messages[-1]
        return last if isinstance(last, AssistantMessage) and (last.prefix or self.continue_final_message) else None

    @property
    def length(self) -> int | None:
        """The most tokens wanted, under either of its names."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def thinking_mode(self) -> Literal["auto", "enabled", "disabled"]:
        """`thinking` when given, else what the template's options or `reasoning_effort` imply."""
        if self.thinking is not None:
            return self.thinking.type
        if self.chat_template_kwargs is not None and self.chat_template_kwargs.mode != "auto":
            return self.chat_template_kwargs.mode
        if self.reasoning_effort is None:
            return "auto"
        return "disabled" if self.reasoning_effort == "none" else "enabled"

    @property
    def scores(self) -> int | None:
        """How many alternatives come with each token's log-probability; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


# Replies ------------------------------------------------------------------------------------------

ChatFinishReason = Literal["stop", "length", "tool_calls"]


class AnswerMessage(BaseModel):
    """The assistant's turn. Thinking comes under both names that clients look for; null when there was none."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=left_out_when_none)


class ChatChoice(BaseModel):
    """One of `n` answers."""

    index: int
    message: AnswerMessage
    finish_reason: ChatFinishReason
    logprobs: ChatLogprobs | None = None


class ChatReply(BaseModel):
    """A whole chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: PromptLogprobs | None = Field(None, exclude_if=left_out_when_none)


class AnswerDelta(BaseModel):
    """What a chunk adds to an answer; fields that it leaves out are unchanged."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallPiece] | None = None


class ChunkChoice(BaseModel):
    """One answer's part of a chunk."""

    index: int
    delta: AnswerDelta
    finish_reason: ChatFinishReason | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None
