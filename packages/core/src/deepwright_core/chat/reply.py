"""What a model wrote, taken apart by its ids and not by its text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants to be called. arguments: as it wrote them, JSON if it did well."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Reply:
    """A completion taken apart.

    thinking: what stands in <think>…</think>; None when the model did not think.
    answer: what comes after, up to the calls; "" when the thinking never ended.
    well_formed: ended with an end token; thinking, if any, opened first and closed exactly once; calls, if any, last,
    complete, and with an object as arguments.
    tool_calls: in order; none when their marks are not where they belong.
    """

    thinking: str | None
    answer: str
    well_formed: bool
    tool_calls: tuple[ToolCall, ...] = ()


def parse_reply(tokenizer: Tokenizer, ids: Sequence[int], *, opened: bool = False) -> Reply:
    """Take a completion apart. `opened`: the prompt already ended in <think>."""
    ids = list(ids)
    finished = bool(ids) and ids[-1] in tokenizer.end_ids
    body = ids[:-1] if finished else ids
    start, end = tokenizer.think_start_id, tokenizer.think_end_id
    starts = [n for n, i in enumerate(body) if i == start]
    ends = [n for n, i in enumerate(body) if i == end]
    if not starts and not ends and not opened:
        answer, calls, right = _answer(tokenizer, body)
        return Reply(None, answer, finished and right, calls)
    if not ends:
        return Reply(tokenizer.decode(body), "", False)
    thinking = body[: ends[0]]
    answer, calls, right = _answer(tokenizer, body[ends[-1] + 1 :])
    right = right and starts == ([] if opened else [0]) and len(ends) == 1
    right = right and not any(i in tokenizer.special_ids for i in thinking[len(starts) :])
    return Reply(tokenizer.decode(thinking), answer, finished and right, calls)


def _answer(tokenizer: Tokenizer, body: Sequence[int]) -> tuple[str, tuple[ToolCall, ...], bool]:
    """The answer's text, the calls behind it, and whether every special token is in its place."""
    begin = tokenizer.marks.get("tool_calls_begin")
    place = body.index(begin) if begin is not None and begin in body else len(body)
    text, rest = body[:place], body[place:]
    right = not any(i in tokenizer.special_ids for i in text)
    calls = _calls(tokenizer, rest) if rest else ()
    if calls is None:
        return tokenizer.decode(text), (), False
    return tokenizer.decode(text), calls, right and all(call.name and _is_object(call.arguments) for call in calls)


def _calls(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[ToolCall, ...] | None:
    """Begin, one or more of (call, name, separator, arguments, end of call), end; None when it is anything else."""
    marks = tokenizer.marks
    words: list[list[int]] = [[]]  # the texts between the special tokens
    order: list[int] = []
    for i in ids:
        if i in tokenizer.special_ids:
            order.append(i)
            words.append([])
        else:
            words[-1].append(i)
    call = [marks.get("tool_call_begin"), marks.get("tool_sep"), marks.get("tool_call_end")]
    count = (len(order) - 2) // 3
    if count < 1 or order != [marks["tool_calls_begin"], *call * count, marks.get("tool_calls_end")]:
        return None
    if any([words[0], *words[1::3], words[-1]]):  # text that belongs to no call
        return None
    texts = [tokenizer.decode(part) for part in words]
    return tuple(ToolCall(texts[2 + 3 * n], texts[3 + 3 * n]) for n in range(count))


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
