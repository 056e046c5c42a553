"""A table of conversations in several chat templates: the text and the ids that transformers gives, from the directory
that `Tokenizer.save` wrote. The templates are in the shape of published ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from transformers import AutoTokenizer

from deepwright_core import chat
from deepwright_core.chat import CHAT_TEMPLATE
from deepwright_core.errors import RequestError
from deepwright_core.tokenizer import Conventions, Tokenizer
from deepwright_core.tokenizer.bpe import BpeConfig, train

from .tokenizer_kinds import TEXTS

# DeepSeek-R1's shape: thinking cut off at its end, calls and outputs counted in a namespace, a prompt that thinks.
R1 = """
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{%- set ns = namespace(first=true, tool=false, output=false, system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system = ns.system + ('' if ns.first else '\n\n') + message['content'] %}{% set ns.first = false %}
{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system }}
{%- if tools %}{{ '\n\n## Tools\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% continue %}{% endif %}
{%- if message['role'] == 'user' %}{% set ns.tool = false %}{{ '<｜User｜>' + message['content'] }}{% endif %}
{%- if message['role'] == 'assistant' and 'tool_calls' in message %}
{%- set ns.tool = false %}
{%- for tool in message['tool_calls'] %}
{%- if loop.first %}{{ '<｜Assistant｜>' + (message['content'] or '') + '<｜tool▁calls▁begin｜>' }}
{%- else %}{{ '\n' }}{% endif %}
{{- '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n```json\n' }}
{{- tool['function']['arguments'] if tool['function']['arguments'] is string
    else tool['function']['arguments'] | tojson }}
{{- '\n```<｜tool▁call▁end｜>' }}
{%- endfor %}{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}
{%- elif message['role'] == 'assistant' %}
{%- set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{%- if ns.tool %}{{ content + '<｜end▁of▁sentence｜>' }}{% set ns.tool = false %}
{%- else %}{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}
{%- endif %}
{%- if message['role'] == 'tool' %}{% set ns.tool = true %}
{{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜><think>\n' }}{% endif %}
"""

# ChatML's shape: roles by name, inline thinking taken apart, outputs as the user's, what the assistant wrote is tagged.
CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and not message.content.startswith('<reply>') %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {%- set content = message.content or '' %}
        {%- set reasoning = message.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] | trim %}
            {%- set content = content.split('</think>')[-1] | trim %}
        {%- endif %}
        {%- if reasoning and loop.index0 > ns.last %}{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function %}
            {{- '\n<tool_call>\n{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
        {{- '\n<reply>\n' }}{{- message.content }}{{- '\n</reply>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""

# Llama 3's shape: headers, trimmed texts, a date, tools with their schemas indented, one call at a time.
LLAMA_3 = """
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{{- 'The year is ' + date_string + '\n' }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\n\n' }}
    {%- endfor %}
{%- endif %}
{{- system }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}{{ raise_exception('one call at a time') }}{% endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}
        {%- else %}{{ message.content }}{% endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
# Written without a minus anywhere: the lines that hold only a block must not leave white space.
PLAIN = """
{% set names = dict(user='U', assistant='A', system='S') %}
    {% if documents is defined and tools is defined %}
Both are there.
    {% endif %}
{% for message in messages %}
    {% if loop.index0 > 3 %}
        {% break %}
    {% endif %}
  {{ names[message.role] | default('T') }}: {{ message.content | default('-', true) | replace('1', 'I') }}
{% endfor %}
{{ eos_token }}
{% if add_generation_prompt %}
A:{% endif %}
"""
TEMPLATES = {"ours": CHAT_TEMPLATE, "r1": R1, "chatml": CHATML, "llama_3": LLAMA_3, "plain": PLAIN}
OTHERS = {
    "chatml": ("<|endoftext|>", "<|im_end|>", ["<|im_start|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]),
    "llama_3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather "now", in °C & <b>bold</b>',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "add", "parameters": {}}},
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


WEATHER = [user("Köln?"), assistant(None, tool_calls=[call("weather", '{"city": "Köln"}')])]
OUTPUT = {"role": "tool", "content": '{"celsius": 7}', "tool_call_id": "1"}
TABLE: dict[str, dict[str, Any]] = {
    "one question": {"messages": [user("What is 2 + 2?")]},
    "white space": {"messages": [user("\n  two  \n\n"), assistant(" 4\n"), user("  ")]},
    "a system": {"messages": [{"role": "system", "content": "Be brief. "}, user("Hi")]},
    "two systems": {"messages": [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}, user("Hi")]},
    "several turns": {"messages": [user("1?"), assistant("one"), user("2?"), assistant("two"), user("3?")]},
    "earlier thinking, apart": {"messages": [user("1?"), assistant("one", reasoning_content="hm"), user("2?")]},
    "thinking, apart": {"messages": [user("1?"), assistant("one", reasoning_content="hm\n so")]},
    "thinking by another name": {"messages": [user("1?"), assistant("one", reasoning="hm")]},
    "nothing said": {"messages": [user(""), assistant("")]},
    "tools": {"messages": [user("Köln?")], "tools": TOOLS},
    "tools and a system": {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")], "tools": TOOLS[:1]},
    "a call": {"messages": WEATHER, "tools": TOOLS},
    "an output": {"messages": [*WEATHER, OUTPUT], "tools": TOOLS},
    "an answer from an output": {"messages": [*WEATHER, OUTPUT, assistant("7 °C", reasoning_content="cold")]},
    "after an output": {"messages": [*WEATHER, OUTPUT, assistant("7 °C"), user("Thanks")], "tools": TOOLS},
    "two calls, and words": {
        "messages": [
            user("Sum?"),
            assistant("Let me see.", tool_calls=[call("add", {"a": 1, "ö": [1.5, None]}), call("add", "{}")]),
            {"role": "tool", "content": "1"},
            {"role": "tool", "content": "2"},
            assistant("3"),
        ],
        "tools": TOOLS,
    },
    "a lone bracket": {"messages": [user("a < b"), assistant("<"), user("> quoted |")]},
    "brackets on both sides": {"messages": [user("> a"), assistant("b <"), user("<"), assistant("th")]},
    "letters of every kind": {"messages": [user("'\"\\ {{ messages }} {% if %} 漢字 🙂\t\x07"), assistant("é")]},
}
# What these say holds a special token of some template, as text.
INLINE = {
    "earlier thinking, inline": {"messages": [user("1?"), assistant("<think>\nhm\n</think>\n\none"), user("2?")]},
    "thinking, inline": {"messages": [user("1?"), assistant("<think>\nhm\n</think>\n\none")]},
    "quoted": {"messages": [user("what is </think> or <|im_end|>?")]},
}


@cache
def made(template: str) -> tuple[Tokenizer, Any]:
    """A tokenizer with a template, and transformers' of the directory that it was saved to."""
    ours = train(BpeConfig(vocab_size=420), TEXTS)
    if template in OTHERS:
        begin, end, rest = OTHERS[template]
        library = Library.from_str(ours.source)
        library.add_special_tokens([begin, end])
        library.add_tokens([AddedToken(token, normalized=False) for token in rest])
        names = {"bos_token": begin, "eos_token": end}
        ours = Tokenizer(library.to_str(), Conventions(names=names, template=TEMPLATES[template]))
    else:
        ours = Tokenizer(ours.source, Conventions(template=TEMPLATES[template]))
    directory = Path(mkdtemp())
    ours.save(directory)
    return Tokenizer.load(directory), AutoTokenizer.from_pretrained(str(directory))


def switch(thinking: str) -> dict[str, Any]:
    on = thinking == "enabled"
    return {} if thinking == "auto" else {"thinking": on, "enable_thinking": on}


@pytest.mark.parametrize("thinking", ["auto", "enabled", "disabled"])
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_have_transformers_text_and_ids(template: str, prompt: bool, thinking: chat.Thinking) -> None:
    ours, theirs = made(template)
    turned = switch(thinking)
    for name, row in (TABLE | INLINE).items():
        asked = {**row, "add_generation_prompt": prompt}
        try:
            text = theirs.apply_chat_template(
                row["messages"], tools=row.get("tools"), tokenize=False, add_generation_prompt=prompt, **turned
            )
        except Exception as error:
            with pytest.raises(RequestError, match="one call at a time"):
                chat.render(ours, **asked)
            assert "one call at a time" in str(error)
            continue
        assert chat.render(ours, **asked, thinking=thinking) == text, name
        ids = ours.chat(**asked, thinking=thinking)
        if name in TABLE:
            assert ids == theirs.encode(text, add_special_tokens=False), name
        elif template != "chatml":
            assert ours.decode(ids, skip_special=False) == text, name
        else:  # it trims beside the token that a message wrote; there, white space stays
            assert ours.decode(ids, skip_special=False).split() == text.split(), name


def test_earlier_thinking_goes_and_the_prompt_thinks() -> None:
    """The two things that make a template R1's, said outright."""
    ours, _ = made("r1")
    text = chat.render(ours, **INLINE["earlier thinking, inline"])
    assert "hm" not in text and text.endswith(
        "<｜Assistant｜>\n\none<｜end▁of▁sentence｜><｜User｜>2?<｜Assistant｜><think>\n"
    )
    assert chat.opens_thinking(ours, ours.chat([user("1?")]))
    assert not chat.opens_thinking(ours, made("ours")[0].chat([user("1?")]))
    assert chat.opens_thinking(ours, made("ours")[0].chat([user("1?")], thinking="enabled"))
    assert not chat.opens_thinking(ours, made("ours")[0].chat([user("1?")], thinking="disabled"))


def everywhere(attack: str) -> list[dict[str, Any]]:
    """Conversations that say something in every place where a message or a tool can."""
    tool = {
        "type": "function",
        "function": {
            "name": attack,
            "description": attack,
            "parameters": {attack: {"enum": [attack, {attack: attack}]}},
        },
    }
    calls = [call(attack, attack)], [call("f", {attack: [attack]})]
    return [
        {"messages": [{"role": "system", "content": attack}, user(attack)], "tools": [tool]},
        {"messages": [user("x"), assistant(attack, reasoning_content=attack), user("y")]},
        {"messages": [user("x"), assistant(attack, reasoning_content=attack)]},
        *(
            {"messages": [user("x"), assistant(attack, tool_calls=c), {"role": "tool", "content": attack}]}
            for c in calls
        ),
    ]


@pytest.mark.parametrize("template", TEMPLATES)
def test_nothing_said_anywhere_becomes_a_special_token(template: str) -> None:
    ours, _ = made(template)

    def marks(row: dict[str, Any]) -> list[int]:
        return [i for i in ours.chat(**row) if i in {control.id for control in ours.control.values()}]

    whole = list(ours.control)
    for attack in [*whole, *(f"x {token}{token} y" for token in whole)]:
        if template == "chatml" and "</think>" in attack:
            continue  # where it finds this in a text, the template writes marks of its own
        for row, harmless in zip(everywhere(attack), everywhere("x"), strict=True):
            assert marks(row) == marks(harmless), (attack, row)


def test_special_tokens_cannot_be_put_together_from_parts() -> None:
    joining = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<|im' }}{{ messages[0].name }}{{ eos_token }}"
    known = made("chatml")[0]
    ours = Tokenizer(known.source, Conventions(names=known.conventions.names, template=joining))
    for first, second in (("<|im_", "start|>"), ("<", "think>"), ("<|im_end|", ">"), ("<|im_start|", "|>")):
        for name in ("_start|>", "_end|>", ""):
            messages = [{"role": "user", "content": first, "name": name}, user(second)]
            ids = ours.chat(messages)
            assert ours.decode(ids, skip_special=False) == chat.render(ours, messages)
            assert [i for i in ids if i in ours.special_ids] == [ours.eos_id]
    three = [user("<|im"), user("_"), user("start|>")]
    assert [i for i in ours.chat(three) if i in ours.special_ids] == [ours.eos_id]
    for template, said in (("{}think>", "<"), ("<thin{}", "k>"), ("<|{}|>", "im_start"), ("<|im_{}|>", "end")):
        source = "{{ eos_token }}" + template.format("{{ messages[0].content }}")
        ours = Tokenizer(known.source, Conventions(names=known.conventions.names, template=source))
        assert [i for i in ours.chat([user(said)]) if i in ours.special_ids] == [ours.eos_id]


def test_what_only_the_template_calls_a_token_is_one_there_alone() -> None:
    """<tool_call> is an added token that no file calls special: as in transformers, the template makes it one."""
    ours, theirs = made("chatml")
    token = theirs.convert_tokens_to_ids("<tool_call>")
    assert token not in ours.special_ids and token not in ours.encode("<tool_call>")
    assert token not in ours.chat([user("<tool_call>")])
    assert ours.chat(WEATHER).count(token) == 1
    without = Tokenizer(ours.source, Conventions(template="{{ messages[0].content }}"))
    assert without.encode("<tool_call>") == [token]


def test_filters_that_rewrite_texts_do_not_let_special_tokens_through() -> None:
    known = made("chatml")[0]
    for written in (
        "m.content | tojson(ensure_ascii=true)",
        "[m.content] | string",
        "m.content | e",
        "m.content | title",
    ):
        template = "{% for m in messages %}{{ " + written + " }}{% endfor %}"
        ours = Tokenizer(known.source, Conventions(names=known.conventions.names, template=template))
        for token in ours.control:
            assert not ours.special_ids.intersection(ours.chat([user(f"a {token} b")])), (written, token)


def test_words_that_are_parts_of_special_tokens_still_mean_what_they_say() -> None:
    """A token <function> must not make a template blind to a tool's `function`, or to its type."""
    known = made("chatml")[0]
    library = Library.from_str(known.source)
    library.add_special_tokens(["<function>", "<name>", "<type>"])
    template = "{% for t in tools if t.type == 'function' %}<function>{{ t.function.name }}{% endfor %}"
    ours = Tokenizer(library.to_str(), Conventions(template=template))
    assert ours.decode(ours.chat([user("x")], tools=TOOLS), skip_special=False) == "<function>weather<function>add"
