"""A problem: a question whose answer can be checked, and where its identity comes from.

Problems that ask the same thing are one problem: they have one canonical text and one id, its SHA-256. The id alone
decides the split, so that the splits are disjoint however, whenever and with whatever seed the problems were drawn.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import RequestError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

# Fixed for good: with shares that follow the wanted sizes, another size would move problems between the splits.
TEST_SHARE = 0.1
VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Problem:
    """One problem. `worked` is the solution step by step as it goes inside <think>; "" if nobody wrote one."""

    id: str
    task: str
    question: str
    answer: str
    metadata: Mapping[str, Any]
    worked: str = ""


def problem_id(task: str, canonical: str) -> str:
    """SHA-256 of the canonical text, as 64 hex digits."""
    return hashlib.sha256(f"{task}\n{canonical}".encode()).hexdigest()


def split_of(identity: str) -> Split:
    """The split of a problem. A cryptographic hash: a modular one can pick out, say, all sums that end in 0."""
    position = int(identity[:16], 16) / 2**64
    if position < TEST_SHARE:
        return "test"
    return "validation" if position < TEST_SHARE + VALIDATION_SHARE else "train"


def dump_problems(problems: Iterable[Problem]) -> str:
    """JSON lines."""
    return "".join(json.dumps(asdict(problem), ensure_ascii=False, sort_keys=True) + "\n" for problem in problems)


def load_problems(path: Path) -> list[Problem]:
    """Read JSON lines; a line that is not a problem is refused by its number."""
    problems = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}; run the prepare stage to write it.") from error
    for number, line in enumerate(lines, 1):
        try:
            problems.append(Problem(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise RequestError(f"{path} line {number} is not a problem: {error}.") from error
    return problems
