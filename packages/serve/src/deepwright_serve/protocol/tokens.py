"""POST /tokenize and /detokenize, in vLLM's forms."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from ..limits import MAX_MESSAGES
from .chat import Message, TemplateOptions
from .tools import TOOLS
from .wire import NAME, TOKEN, Wire, Wrong


class TokenizeRequest(Wire):
    """A text (`prompt`) or a conversation (`messages`), as a completion or an answer would see it.

    `add_special_tokens` puts what begins a text before a prompt; a conversation brings its own.
    """

    model: NAME | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: TOOLS | None = None
    add_generation_prompt: bool = True
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise Wrong("prompt", "or messages must be given, and not both.")
        if self.messages is None and self.tools:
            raise Wrong("tools", "belong to messages, and there is a prompt.")
        return self

    @property
    def thinking_mode(self) -> Literal["auto", "enabled", "disabled"]:
        """How the conversation's prompt ends."""
        return "auto" if self.chat_template_kwargs is None else self.chat_template_kwargs.mode


class TokenizeReply(BaseModel):
    """The ids. `token_strs`: each one's text, when asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Wire):
    """Ids to text."""

    model: NAME | None = None
    tokens: list[TOKEN]


class DetokenizeReply(BaseModel):
    """Their text, special tokens written out."""

    prompt: str
