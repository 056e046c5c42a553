"""Errors that are sentences.

A `RequestError` says that the user asked for something that cannot be done: a wrong override,
a missing file, an impossible shape. It carries one problem a line, each naming the field, the value,
what was expected and what to do. The command line prints it and exits with 2. A `WorkError` says that a
correct request failed while it was being done (a full disk, a corrupt checkpoint); exit status 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class RequestError(ValueError):
    """The request was wrong.

    `problems` holds one sentence for each problem found, so that they can be shown all at once.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class WorkError(RuntimeError):
    """The request was right and the work failed."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the nearest known names, or lists what there is.

    >>> did_you_mean("gqqa", ["gqa", "mla"])
    'Did you mean gqa? Known: gqa, mla.'
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."
