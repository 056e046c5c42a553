"""Worked solutions for number_sorting: take out the next number, write what is left, until nothing is left.

ascending 5, 8, 1        1: 5 8
                         5: 8
                         8:
                         answer ['1', '5', '8']
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def canonical(metadata: Mapping[str, Any], question: str) -> str:
    """The numbers in order; up and down are one problem."""
    return " ".join(sorted(metadata["original_numbers"], key=float))


def worked(metadata: Mapping[str, Any], question: str, answer: str) -> str:
    """One line for each number taken."""
    left = list(metadata["original_numbers"])
    choose = min if metadata["direction"] == "ascending" else max
    lines = []
    while left:
        taken = choose(left, key=float)
        left.remove(taken)
        lines.append(f"{taken}: {' '.join(left)}".rstrip())
    return "\n".join(lines)
