"""deepwright's chat form, which is DeepSeek's.

The same form exists twice on purpose. `CHAT_TEMPLATE` is Jinja text that travels with the model, for other programs.
`pieces` is the form as structure. A test holds the two together.

A prompt ends in <｜Assistant｜> ("auto": the model decides whether to think), or in <think> ("enabled"), or in
<think></think> ("disabled"). Earlier assistant turns lose their thinking; only a conversation's last turn, as training
sees it, keeps it. Tools are told of behind the system's text; the assistant goes on right behind their outputs, without
a mark of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .conversation import Thinking
from .piece import Piece

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

INTRODUCTION = "You can call these functions; each line describes one and its arguments in JSON:"

CHAT_TEMPLATE = """\
{%- if thinking is not defined or thinking is none %}{% set thinking = 'auto' %}{% endif -%}
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{{- bos_token -}}
{%- set form = namespace(opened=false, tool=false) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- if form.opened %}{{ '\\n\\n' }}{% endif -%}
{%- set form.opened = true -%}
{{- message['content'] -}}
{%- endfor -%}
{%- if tools -%}
{%- if form.opened %}{{ '\\n\\n' }}{% endif -%}
{{- 'INTRODUCTION' -}}
{%- for tool in tools %}{{ '\\n' + (tool['function'] | tojson) }}{% endfor -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<｜User｜>' + message['content'] -}}
{%- set form.tool = false -%}
{%- elif message['role'] == 'tool' -%}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' -}}
{%- set form.tool = true -%}
{%- elif message['role'] == 'assistant' -%}
{%- if not form.tool %}{{ '<｜Assistant｜>' }}{% endif -%}
{%- set form.tool = false -%}
{%- set content = message['content'] or '' -%}
{%- if loop.last and not add_generation_prompt -%}
{%- if message['reasoning_content'] is defined and message['reasoning_content'] -%}
{{- '<think>' + message['reasoning_content'] + '</think>' -}}
{%- endif -%}
{{- content -}}
{%- else -%}
{{- content.split('</think>')[-1] -}}
{%- endif -%}
{%- if message['tool_calls'] -%}
{{- '<｜tool▁calls▁begin｜>' -}}
{%- for call in message['tool_calls'] -%}
{%- set arguments = call['function']['arguments'] -%}
{{- '<｜tool▁call▁begin｜>' + call['function']['name'] + '<｜tool▁sep｜>' -}}
{%- if arguments is string %}{{ arguments }}{% else %}{{ arguments | tojson }}{% endif -%}
{{- '<｜tool▁call▁end｜>' -}}
{%- endfor -%}
{{- '<｜tool▁calls▁end｜>' -}}
{%- endif -%}
{{- eos_token -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if not form.tool %}{{ '<｜Assistant｜>' }}{% endif -%}
{%- if thinking == 'enabled' or thinking is sameas true %}{{ '<think>' }}
{%- elif thinking == 'disabled' or thinking is sameas false %}{{ '<think></think>' }}{% endif -%}
{%- endif -%}
""".replace("INTRODUCTION", INTRODUCTION)


def is_ours(template: str | None) -> bool:
    """Whether conversations are written in this form: with our template, or none at all."""
    return template is None or template == CHAT_TEMPLATE


def form_pieces(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any] | None,
    thinking: Thinking,
    add_generation_prompt: bool,
) -> list[Piece]:
    """The form of a conversation (as `conversation` gives it), in order."""
    opening = [message["content"] for message in messages if message["role"] == "system"]
    if tools:
        opening.append("\n".join([INTRODUCTION, *(_json(tool["function"]) for tool in tools)]))

    def mark(name: str, learn: bool = False) -> Piece:
        return Piece(tokenizer.spelling[name], learn=learn)

    form = [mark("bos"), Piece(text="\n\n".join(opening))]
    behind_output = False
    for n, message in enumerate(messages):
        role, content = message["role"], message.get("content", "")
        if role == "user":
            form += [mark("user"), Piece(text=content)]
        elif role == "tool":
            form += [mark("tool_output_begin"), Piece(text=content), mark("tool_output_end")]
        elif role == "assistant":
            form += [] if behind_output else [mark("assistant")]
            if n == len(messages) - 1 and not add_generation_prompt:
                if message.get("reasoning_content"):
                    thought = Piece(text=message["reasoning_content"], learn=True)
                    form += [mark("think_start", True), thought, mark("think_end", True)]
            else:
                content = content.split("</think>")[-1]
            form.append(Piece(text=content, learn=True))
            if calls := message.get("tool_calls"):
                form.append(mark("tool_calls_begin", True))
                for call in calls:
                    name, arguments = call["function"]["name"], call["function"]["arguments"]
                    text = arguments if isinstance(arguments, str) else _json(arguments)
                    form += [mark("tool_call_begin", True), Piece(text=name, learn=True), mark("tool_sep", True)]
                    form += [Piece(text=text, learn=True), mark("tool_call_end", True)]
                form.append(mark("tool_calls_end", True))
            form.append(mark("eos", True))
        if role != "system":
            behind_output = role == "tool"
    if add_generation_prompt:
        form += [] if behind_output else [mark("assistant")]
        if thinking != "auto":
            form.append(mark("think_start"))
        if thinking == "disabled":
            form.append(mark("think_end"))
    return form


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
