"""Which datasets have worked solutions and a canonical form of their own.

A dataset without one can still be used: its problems are their question's text, and `worked` is "", which leaves
reinforcement as the only way to learn them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import worked_chain_sum, worked_gcd, worked_number_sorting

Writer = Callable[[Mapping[str, Any], str, str], str]
Canonical = Callable[[Mapping[str, Any], str], str]


@dataclass(frozen=True)
class Form:
    """canonical(metadata, question): the text that equal problems share. worked(metadata, question, answer)."""

    canonical: Canonical
    worked: Writer


def _text(metadata: Mapping[str, Any], question: str) -> str:
    return " ".join(question.lower().split())


def _nothing(metadata: Mapping[str, Any], question: str, answer: str) -> str:
    return ""


PLAIN = Form(_text, _nothing)
FORMS: dict[str, Form] = {
    "chain_sum": Form(worked_chain_sum.canonical, worked_chain_sum.worked),
    "gcd": Form(worked_gcd.canonical, worked_gcd.worked),
    "number_sorting": Form(worked_number_sorting.canonical, worked_number_sorting.worked),
}


def form_of(dataset: str) -> Form:
    """The form of a dataset, or the plain one."""
    return FORMS.get(dataset, PLAIN)
