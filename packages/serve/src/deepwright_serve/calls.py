"""Calls of tools in what a model writes: read by token id as they come, and forced where a request wants them.

The marks are DeepSeek's: begin, one or more of (call, name, separator, arguments, end of call), end. Text that merely
looks like them stays text. A tokenizer that has no such marks cannot be served with tools.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from deepwright_core.tokenizer import StreamDecoder, Tokenizer

from .protocol import ChatRequest
from .protocol.tools import NamedTool, Tool
from .refusal import Refusal
from .structured import Form, lark_of, lark_of_json

ANY_TEXT = r"/(.|\n)*/"
MARKS = ("tool_calls_begin", "tool_call_begin", "tool_sep", "tool_call_end", "tool_calls_end")


def require_marks(tokenizer: Tokenizer) -> None:
    """Refuse tools where the tokenizer has no marks for calls."""
    missing = [tokenizer.spelling[mark] for mark in MARKS if mark not in tokenizer.marks]
    if missing:
        raise Refusal(
            400, f"tools cannot be used with this model: its tokenizer has no {', '.join(missing)}, which calls are "
            "written with. Leave tools out.", param="tools",
        )  # fmt: skip


# What an answer may be ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calling:
    """What a request's tools mean for its answer.

    possible: whether it may hold calls. stop_ids: marks that end it. bans: marks that it must not write. form: the
    grammar that it must keep to.
    """

    possible: bool = False
    stop_ids: tuple[int, ...] = ()
    bans: tuple[int, ...] = ()
    form: Form | None = None


def calling(request: ChatRequest, tokenizer: Tokenizer, form: Form | None) -> Calling:
    """What `tools`, `tool_choice` and `parallel_tool_calls` come to. form: of an answer in text.

    The tokenizer has the marks of calls, if there are tools. A demanded call is a grammar: the marks by id, a name, and
    arguments that are valid against the function's schema. Where the model chooses, its calls are free, unless a
    function is `strict`; its text keeps to `form` in any case.
    """
    tools = request.tools or []
    if not tools:
        return Calling(form=form)
    if request.tool_choice == "none":
        return Calling(bans=(tokenizer.mark_id("tool_calls_begin"),), form=form)
    several = request.parallel_tool_calls is not False
    stop_ids = (tokenizer.mark_id("tool_calls_end" if several else "tool_call_end"),)
    match request.tool_choice:
        case NamedTool(function=named):
            chosen = [tool for tool in tools if tool.function.name == named.name]
            source = call_grammar(tokenizer, chosen, several=False)
            return Calling(True, (tokenizer.mark_id("tool_call_end"),), (), Form("lark", source, "tools"))
        case "required":
            return Calling(True, stop_ids, (), Form("lark", call_grammar(tokenizer, tools, several), "tools"))
    if form is None and not any(tool.function.strict for tool in tools):
        return Calling(True, stop_ids)
    text = ANY_TEXT if form is None else lark_of(form)
    source = call_grammar(tokenizer, tools, several, start=f"text {'calls?' if form is None else '| calls'}", text=text)
    return Calling(True, stop_ids, (), Form("lark", source, "tools" if form is None else form.field))


def call_grammar(
    tokenizer: Tokenizer, tools: Sequence[Tool], several: bool, start: str = "calls", text: str = '""'
) -> str:
    """Calls of these functions, in llguidance's form of Lark. start, text: right sides of the rules of these names."""

    def mark(name: str) -> str:
        return f"<[{tokenizer.mark_id(name)}]>"

    heads = [f"{json.dumps(tool.function.name)} {mark('tool_sep')} arguments_{n}" for n, tool in enumerate(tools)]
    rules = {
        "start": start,
        "text": text,
        "calls": f"{mark('tool_calls_begin')} call{'+' if several else ''} {mark('tool_calls_end')}",
        "call": f"{mark('tool_call_begin')} ({' | '.join(heads)}) {mark('tool_call_end')}",
        **{f"arguments_{n}": lark_of_json(arguments_schema(tool)) for n, tool in enumerate(tools)},
    }
    return "\n".join(f"{name}: {right}" for name, right in rules.items())


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object whatever else is said of them."""
    parameters = tool.function.parameters
    return {**({"additionalProperties": False} if parameters is None else parameters), "type": "object"}


# What it was ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallPiece:
    """What became known of the call at `index`. Its first piece has the name, and the id under which its output is to
    come back; the arguments (JSON text) follow in pieces."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass
class Call:
    """A call so far."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class CallReader:
    """Takes the tokens from the mark that begins the calls onwards.

    Text that belongs to no call is dropped, and so is a call without a name and a separator.
    """

    tokenizer: Tokenizer
    calls: list[Call] = field(default_factory=list)
    _decoder: StreamDecoder | None = None  # while a name or arguments are read
    _name: str | None = None  # while a name is read

    def push(self, token_id: int) -> tuple[CallPiece, ...]:
        """Take one token; what it made known."""
        marks = self.tokenizer.marks
        if token_id == marks["tool_call_begin"]:
            self._decoder, self._name = StreamDecoder(self.tokenizer), ""
            return ()
        if self._decoder is None:
            return ()
        if token_id == marks["tool_sep"] and self._name is not None:
            call = Call(f"call_{secrets.token_hex(12)}", self._name + self._decoder.flush())
            self._decoder, self._name = StreamDecoder(self.tokenizer), None
            if not call.name:
                self._decoder = None
                return ()
            self.calls.append(call)
            return (CallPiece(len(self.calls) - 1, id=call.id, name=call.name),)
        if token_id in (marks["tool_call_end"], marks["tool_calls_end"]):
            return self.finish()
        return self._take(self._decoder.push(token_id))

    def finish(self) -> tuple[CallPiece, ...]:
        """Whatever was held back of the call that is being read, which ends here."""
        if self._decoder is None:
            return ()
        pieces = self._take(self._decoder.flush())
        self._decoder = self._name = None
        return pieces

    def _take(self, text: str) -> tuple[CallPiece, ...]:
        if self._name is not None:
            self._name += text
            return ()
        if not text:
            return ()
        self.calls[-1].arguments += text
        return (CallPiece(len(self.calls) - 1, text),)
