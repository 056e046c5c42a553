"""What form an answer must have, whichever of its many spellings a request uses, and the grammar of it.

A form is a kind of grammar and its source; calls that a request demands are one too (see `calls`).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from typing import Any, NamedTuple

from deepwright_core.engine import Grammar
from deepwright_core.engine.grammar import WHITE_SPACE, GrammarKind, compile_grammar
from deepwright_core.errors import RequestError
from deepwright_core.tokenizer import Tokenizer

from .limits import MAX_WAITING_FORMS
from .protocol import ChatRequest, CompletionRequest
from .protocol.structured import JsonFormat, SchemaFormat
from .refusal import Refusal

# Compiling takes a core for up to a second; more at once would only slow the engine down.
COMPILING_AT_ONCE = 2
COMPILED_KEPT = 128


class Form(NamedTuple):
    """A grammar to be compiled. field: where the request asks for it."""

    kind: GrammarKind
    source: Any
    field: str


def form_of(request: ChatRequest | CompletionRequest) -> Form | None:
    """The form that a request asks for, None when any text will do; refuses two."""
    forms = []
    match request.response_format:
        case JsonFormat():
            forms.append(Form("json_object", None, "response_format"))
        case SchemaFormat(json_schema=named):
            schema = {"type": "object"} if named.schema_ is None else named.schema_
            forms.append(Form("json_schema", schema, "response_format.json_schema.schema"))
    if (structured := request.structured_outputs) is not None:
        if structured.json_ is not None:
            forms.append(Form("json_schema", structured.json_, "structured_outputs.json"))
        elif structured.json_object:
            forms.append(Form("json_object", None, "structured_outputs.json_object"))
        elif structured.regex is not None:
            forms.append(Form("regex", structured.regex, "structured_outputs.regex"))
        else:
            forms.append(Form("choice", structured.choice, "structured_outputs.choice"))
    if request.guided_json is not None:
        forms.append(Form("json_schema", request.guided_json, "guided_json"))
    if request.guided_regex is not None:
        forms.append(Form("regex", request.guided_regex, "guided_regex"))
    if request.guided_choice is not None:
        forms.append(Form("choice", request.guided_choice, "guided_choice"))
    if len(forms) > 1:
        raise Refusal(
            400, f"{' and '.join(form.field for form in forms)} each ask for a form of the answer; give one of them.",
            param=forms[1].field,
        )  # fmt: skip
    return forms[0] if forms else None


def lark_of(form: Form) -> str:
    """A form as the right side of a rule in llguidance's Lark."""
    match form.kind:
        case "json_object":
            return lark_of_json({"type": "object"})
        case "json_schema":
            return lark_of_json(form.source if isinstance(form.source, dict) else json.loads(form.source))
        case "regex":
            inside = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", form.source, flags=re.DOTALL)
            return f"/{inside}/"
        case _:
            return " | ".join(json.dumps(choice, ensure_ascii=False) for choice in form.source)


def lark_of_json(schema: dict[str, Any]) -> str:
    """JSON of a schema as the right side of a rule, with no more white space than other forms have."""
    return f"%json {json.dumps(schema | {'x-guidance': {'whitespace_pattern': WHITE_SPACE}})}"


class Compiler:
    """Compiles forms off the event loop, and keeps the latest: clients ask for the same few again and again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Tokenizer, str, str], Grammar] = OrderedDict()
        self._room = asyncio.Semaphore(COMPILING_AT_ONCE)
        self._waiting = 0

    async def compile(self, tokenizer: Tokenizer, form: Form) -> Grammar:
        """The grammar of a form; refuses one that means nothing, or is too much to compile."""
        key = (tokenizer, form.kind, json.dumps(form.source))
        if key not in self._kept:
            if self._waiting >= MAX_WAITING_FORMS:
                raise Refusal(
                    429, f"{self._waiting} forms of answers wait to be compiled; wait a moment and try again.",
                    param=form.field, code="queue_full", headers={"Retry-After": "1"},
                )  # fmt: skip
            self._waiting += 1
            try:
                async with self._room:
                    # Another request may have asked for the same meanwhile.
                    grammar = self._kept.get(key)
                    if grammar is None:
                        grammar = await asyncio.to_thread(compile_grammar, tokenizer, form.kind, form.source)
            except RequestError as error:
                raise Refusal(400, f"{form.field}: {error}", param=form.field) from error
            finally:
                self._waiting -= 1
            self._kept[key] = grammar
            while len(self._kept) > COMPILED_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
