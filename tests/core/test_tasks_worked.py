"""Worked solutions: every line is true, follows from the question and the lines before, and they end at the answer."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import reasoning_gym

from deepwright_core.tasks import worked_chain_sum, worked_gcd, worked_number_sorting
from deepwright_core.tasks.worked import form_of

TWO_TERMS = {"min_terms": 2, "max_terms": 2, "min_digits": 3, "max_digits": 3}


def draw(name: str, count: int, **options: Any) -> list[dict[str, Any]]:
    dataset = reasoning_gym.create_dataset(name, seed=11, size=count, **options)
    return [dataset[index] for index in range(count)]


def work(name: str, entry: dict[str, Any]) -> list[str]:
    return form_of(name).worked(entry["metadata"], entry["question"], entry["answer"]).split("\n")


def chain(expression: str) -> str:
    return worked_chain_sum.worked({"expression": expression}, "", "")


def test_the_formats_are_these() -> None:
    assert chain("357 + 468") == "7+8=15\n5+6+1=12\n3+4+1=8"
    assert chain("141 - 365") == "365>141 -\n5-1=4\n6-4=2\n3-1=2"
    assert chain("704 - 298") == "704>298\n14-8=6\n10-9-1=0\n7-2-1=4"
    assert chain("957 + 68") == "7+8=15\n5+6+1=12\n9+0+1=10"
    assert chain("365 - 365") == "365=365\n5-5=0\n6-6=0\n3-3=0"
    assert chain("12 - 30 - 5") == "12-30\n30>12 -\n10-2=8\n3-1-1=1\n-(18+5)\n8+5=13\n1+0+1=2"
    assert chain("5 - 0") == "5>0\n5-0=5"
    assert chain("-3 + 5") == "5-3\n5>3\n5-3=2"
    assert chain("7") == ""
    assert worked_gcd.worked({"numbers": [18, 48]}, "", "6") == "48=2*18+12\n18=1*12+6\n12=2*6+0"
    metadata = {"original_numbers": ["5", "8", "1"], "direction": "ascending"}
    assert worked_number_sorting.worked(metadata, "", "") == "1: 5 8\n5: 8\n8:"


def true(line: str) -> bool:
    """Whether an equation of plain integers holds, computed here."""
    left, right = line.split("=")
    return sum(int(term) for term in re.findall(r"[+-]?\d+", left)) == int(right)


def follow(lines: list[str], a: int, b: int, operator: str) -> int:
    """Redo one step from its lines: check each against the digits and the line before; returns what they spell."""
    sign = 1
    if operator == "-":
        head, *lines = lines
        assert head == (f"{a}>{b}" if a > b else f"{a}={b}" if a == b else f"{b}>{a} -")
        sign = -1 if head.endswith(" -") else 1
        a, b = max(a, b), min(a, b)
    width = max(len(str(a)), len(str(b)))
    assert len(lines) == width
    digits = []
    passed_on = False
    for place, line in enumerate(lines):
        x, y = a // 10**place % 10, b // 10**place % 10
        assert true(line), line
        left, right = line.split("=")
        if operator == "+":
            assert left == f"{x}+{y}" + ("+1" if passed_on else "")
            passed_on = int(right) >= 10
            digits.append(right if place == width - 1 else right[-1])
        else:
            borrows = x - y - passed_on < 0
            assert left == ("1" if borrows else "") + f"{x}-{y}" + ("-1" if passed_on else "")
            assert len(right) == 1
            passed_on = borrows
            digits.append(right)
    assert operator == "+" or not passed_on
    return sign * int("".join(reversed(digits)))


def test_three_thousand_default_problems_follow_line_by_line() -> None:
    longest = 0
    for entry in draw("chain_sum", 3000, **TWO_TERMS):
        lines = work("chain_sum", entry)
        a, operator, b = entry["metadata"]["expression"].split()
        assert follow(lines, int(a), int(b), operator) == int(entry["answer"])
        longest = max(longest, len("\n".join(lines)))
    # A character is at most a token, and every digit, sign and line end is one.
    assert longest <= 35


@pytest.mark.parametrize("negation", [False, True])
def test_longer_chains_follow_line_by_line(negation: bool) -> None:
    options = {"min_terms": 2, "max_terms": 5, "min_digits": 1, "max_digits": 4, "allow_negation": negation}
    for entry in draw("chain_sum", 1500, **options):
        expression = entry["metadata"]["expression"]
        assert eval(compile(ast.parse(expression, mode="eval"), "", "eval"), {}) == int(entry["answer"])
        lines = work("chain_sum", entry)
        first, *rest = worked_chain_sum.terms(expression)
        total = first
        plain = re.fullmatch(r"(\d+) ([+-]) (\d+)", expression)
        while lines:
            term = rest.pop(0)
            if plain:
                a, operator, b = plain.groups()
                negated = False
            else:
                head = lines.pop(0)
                negated = head.startswith("-(")
                a, operator, b = re.fullmatch(r"(?:-\()?(\d+)([+-])(\d+)\)?", head).groups()  # type: ignore[union-attr]
            value = int(a) + int(b) if operator == "+" else int(a) - int(b)
            assert (-value if negated else value) == total + term, "the head states another step"
            count = max(len(a), len(b)) + (operator == "-")
            step, lines = lines[:count], lines[count:]
            result = follow(step, int(a), int(b), operator)
            total += term
            assert (-result if negated else result) == total
        assert not rest
        assert total == int(entry["answer"])


def test_euclid_ends_at_the_gcd() -> None:
    for entry in draw("gcd", 1000, max_numbers=4):
        lines = work("gcd", entry)
        waiting = list(entry["metadata"]["numbers"])
        divisor = waiting.pop(0)
        known = None
        for line in lines:
            dividend, quotient, by, remainder = map(int, re.fullmatch(r"(\d+)=(\d+)\*(\d+)\+(\d+)", line).groups())  # type: ignore[union-attr]
            assert dividend == quotient * by + remainder and remainder < by
            if known is None:
                number = waiting.pop(0)
                assert (dividend, by) == (max(divisor, number), min(divisor, number))
            else:
                assert (dividend, by) == known
            known = (by, remainder) if remainder else None
            divisor = by
        assert not waiting and known is None
        assert divisor == int(entry["answer"])


def test_sorting_takes_out_one_number_a_line() -> None:
    for entry in draw("number_sorting", 500):
        left = list(entry["metadata"]["original_numbers"])
        taken = []
        for line in work("number_sorting", entry):
            number, rest = line.split(":")
            best = min if entry["metadata"]["direction"] == "ascending" else max
            assert float(number) == best(map(float, left))
            left.remove(number)
            assert rest.split() == left
            taken.append(number)
        assert not left
        assert [float(number) for number in taken] == [float(number) for number in ast.literal_eval(entry["answer"])]


def test_a_dataset_that_nobody_wrote_for_has_no_worked_solution() -> None:
    entry = draw("basic_arithmetic", 1)[0]
    assert work("basic_arithmetic", entry) == [""]
    assert form_of("basic_arithmetic").canonical({}, "A  b\nC") == "a b c"
