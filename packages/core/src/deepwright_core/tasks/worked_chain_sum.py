"""Worked solutions for chain_sum: column by column, every line computable from the question and the lines before.

    357 + 468                141 - 365
    7+8=15                   365>141 -       the larger first; the sign of the result
    5+6+1=12                 5-1=4
    3+4+1=8                  6-4=2
    answer 825               3-1=2
                             answer -224

A column shows both digits and, if there is one, the carry (+1) or borrow (-1). A difference that borrows shows its
ten: `13-8=5` borrows from the next column, `13-8-1=4` was borrowed from as well. The last column of a sum keeps its
carry. Shorter numbers are filled with 0. With more than two terms, or a negative one, each step is headed by what it
computes, as `12-30` or, for two negative numbers, `-(18+5)`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PLAIN = re.compile(r"(\d+) ([+-]) (\d+)")
TERM = re.compile(r"([+-]?)\s*(-?\d+)")


def terms(expression: str) -> list[int]:
    """The signed terms of a chain: `7 - 3 + -2` is [7, -3, -2]."""
    found = []
    for operator, number in TERM.findall(expression.replace(" ", "").replace("--", "+").replace("+-", "-")):
        found.append(-int(number) if operator == "-" else int(number))
    return found


def canonical(metadata: Mapping[str, Any], question: str) -> str:
    """Order-free, and a-b the same as b-a: whoever knows one knows the other."""
    signed = sorted(terms(metadata["expression"]))
    return min(" ".join(map(str, form)) for form in (signed, sorted(-term for term in signed)))


def worked(metadata: Mapping[str, Any], question: str, answer: str) -> str:
    """The columns of each step, from left to right; headed by the step unless it is the question itself."""
    expression = metadata["expression"]
    if plain := PLAIN.fullmatch(expression):
        a, operator, b = plain.groups()
        return "\n".join(_add(int(a), int(b)) if operator == "+" else _subtract(int(a), int(b)))
    total, *rest = terms(expression)
    lines: list[str] = []
    for term in rest:
        head, columns = _step(total, term)
        lines += [head, *columns]
        total += term
    return "\n".join(lines)


def _step(total: int, term: int) -> tuple[str, list[str]]:
    a, b = abs(total), abs(term)
    if total >= 0 and term >= 0:
        return f"{a}+{b}", _add(a, b)
    if total < 0 and term < 0:
        return f"-({a}+{b})", _add(a, b)
    return (f"{a}-{b}", _subtract(a, b)) if term < 0 else (f"{b}-{a}", _subtract(b, a))


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    width = max(len(str(a)), len(str(b)))
    return [(int(x), int(y)) for x, y in zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1], strict=True)]


def _add(a: int, b: int) -> list[str]:
    lines = []
    carry = 0
    for x, y in _columns(a, b):
        lines.append(f"{x}+{y}{'+1' if carry else ''}={x + y + carry}")
        carry = (x + y + carry) // 10
    return lines


def _subtract(a: int, b: int) -> list[str]:
    if a >= b:
        lines = [f"{a}>{b}" if a > b else f"{a}={b}"]
    else:
        lines = [f"{b}>{a} -"]
        a, b = b, a
    borrow = 0
    for x, y in _columns(a, b):
        ten = 10 if x - y - borrow < 0 else 0
        lines.append(f"{ten + x}-{y}{'-1' if borrow else ''}={ten + x - y - borrow}")
        borrow = 1 if ten else 0
    return lines
