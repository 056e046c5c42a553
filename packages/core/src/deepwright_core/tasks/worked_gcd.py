"""Worked solutions for gcd: Euclid's steps, dividend = quotient*divisor+remainder, until nothing remains.

    48, 18        48=2*18+12
                  18=1*12+6
                  12=2*6+0
                  answer 6

With more than two numbers the result so far goes on with the next number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def canonical(metadata: Mapping[str, Any], question: str) -> str:
    """The order of the numbers does not matter."""
    return " ".join(map(str, sorted(metadata["numbers"])))


def worked(metadata: Mapping[str, Any], question: str, answer: str) -> str:
    """Euclid's steps, the larger number first."""
    first, *rest = metadata["numbers"]
    lines = []
    divisor = first
    for number in rest:
        dividend, divisor = max(divisor, number), min(divisor, number)
        while True:
            quotient, remainder = divmod(dividend, divisor)
            lines.append(f"{dividend}={quotient}*{divisor}+{remainder}")
            if remainder == 0:
                break
            dividend, divisor = divisor, remainder
    return "\n".join(lines)
