"""Functions that a model may ask to have called, and the calls that it makes: OpenAI's forms.

Left out: custom (free-text) tools, lists of allowed tools, and the older `functions`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from ..limits import MAX_TOOLS
from .wire import Wire, left_out_when_none

FUNCTION_NAME = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


class FunctionDefinition(Wire):
    """A function: what it is called, what it does, and its arguments as a JSON schema (none: no arguments)."""

    name: FUNCTION_NAME
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Wire):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Wire):
    """The function that a tool_choice names."""

    name: FUNCTION_NAME


class NamedTool(Wire):
    """tool_choice: exactly this function is to be called."""

    type: Literal["function"]
    function: FunctionName


TOOLS = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
TOOL_CHOICE = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Wire):
    """A call in an earlier answer: arguments are JSON text, as the model wrote it."""

    name: FUNCTION_NAME
    arguments: str


class EarlierCall(Wire):
    """A call that comes back with an assistant's message. `index` is left from streamed pieces; it says nothing."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"]
    function: CalledFunction
    index: int | None = None


# Replies ------------------------------------------------------------------------------------------


class FunctionCall(BaseModel):
    """What is to be called."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call in an answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionPiece(BaseModel):
    """A piece of a call: the name comes whole and first, the arguments in pieces to be put together."""

    name: str | None = Field(None, exclude_if=left_out_when_none)
    arguments: str


class ToolCallPiece(BaseModel):
    """What a chunk adds to the call at `index`; id, type and name come with its first piece."""

    index: int
    id: str | None = Field(None, exclude_if=left_out_when_none)
    type: Literal["function"] | None = Field(None, exclude_if=left_out_when_none)
    function: FunctionPiece
