"""What a conversation is: messages and tools as OpenAI's clients write them, checked and made uniform."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ..errors import RequestError

Thinking = Literal["auto", "enabled", "disabled"]
Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
# A turn's thinking goes by several names; the first is the one that is read here.
REASONING = ("reasoning_content", "thinking", "reasoning")


def conversation(messages: Messages, tools: Tools | None = None) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages and tools as plain data of one's own: no key without a value, thinking under each of its names that
    templates read. Refuses what is not a conversation, with one sentence for each problem."""
    problems = []
    if not messages:
        problems.append("messages is empty; expected at least one message.")
    uniform = [_uniform(message, f"messages[{n}]", problems) for n, message in enumerate(messages)]
    for n, message in enumerate(uniform):
        _check_message(message, uniform[n - 1] if n else {}, f"messages[{n}]", problems)
    for n, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problems.append(
                f"tools[{n}] names no function; expected {{'type': 'function', 'function': {{'name': …}}}}."
            )
    plain_tools = None if tools is None else [_plain(tool, f"tools[{n}]", problems) for n, tool in enumerate(tools)]
    if problems:
        raise RequestError(problems)
    return uniform, plain_tools


def _uniform(message: Mapping[str, Any], where: str, problems: list[str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        problems.append(f"{where} is {type(message).__name__}; expected a mapping with role and content.")
        return {}
    given = {str(k): _plain(v, f"{where}.{k}", problems) for k, v in message.items() if v is not None}
    reasoning = next((given[name] for name in REASONING if name in given), None)
    if reasoning is not None and given.get("role") == "assistant":
        return {"thinking": reasoning, **given, "reasoning_content": reasoning}
    return given


def _plain(value: Any, where: str, problems: list[str]) -> Any:
    """A copy in plain types: templates must not reach the methods of anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{where}.{key}", problems) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{n}]", problems) for n, inner in enumerate(value)]
    problems.append(f"{where} is {type(value).__name__}; expected text, numbers, lists and mappings, as in JSON.")
    return None


def _check_message(message: Mapping[str, Any], before: Mapping[str, Any], where: str, problems: list[str]) -> None:
    role = message.get("role")
    calls = message.get("tool_calls") or []
    if role not in ROLES:
        problems.append(f"{where}.role is {role!r}; expected system, user, assistant or tool.")
    if "content" not in message and not (role == "assistant" and calls):
        problems.append(f"{where}.content is missing; expected text.")
    elif not isinstance(message.get("content", ""), str):
        problems.append(f"{where}.content is {type(message['content']).__name__}; expected text.")
    if not isinstance(message.get("reasoning_content", ""), str):
        problems.append(f"{where}.reasoning_content is not text; expected text or nothing.")
    if role == "tool" and before.get("role") != "tool" and not before.get("tool_calls"):
        problems.append(f"{where} is the output of a tool; expected it behind a message with tool_calls.")
    if calls and role != "assistant":
        problems.append(f"{where}.tool_calls belongs to role {role!r}; only the assistant calls tools.")
    for n, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            problems.append(
                f"{where}.tool_calls[{n}] names no function; expected {{'function': {{'name', 'arguments'}}}}."
            )
        elif not isinstance(function.get("arguments"), str | dict):
            problems.append(f"{where}.tool_calls[{n}].function.arguments must be JSON text or a mapping.")
