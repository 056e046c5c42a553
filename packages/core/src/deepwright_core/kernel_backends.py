"""The config section `kernels`: operator -> the backend that it runs with. What it leaves out is `auto`'s choice.

A backend that is named runs or the request is refused; nothing gives way silently. It is part of the identity of the
stages that compute with models, because two backends agree to rounding only. What `auto` comes to is not, as the
machine is not.

Leaves out what a backend needs of sizes: that is known when the operator is called, and refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from deepwright_kernels import configure, dispatch

from .errors import RequestError, did_you_mean
from .training.machine import pick_device


def parse(section: Any) -> dict[str, str]:
    """The choices other than `auto`. `RequestError` with a sentence for each that is unknown or cannot run here."""
    if not isinstance(section, Mapping):
        raise RequestError(f"kernels is {section!r}; expected a mapping from operators to backends.")
    known = dispatch.operators()
    chosen: dict[str, str] = {}
    problems: list[str] = []
    for name, backend in section.items():
        if name not in known:
            problems.append(f"kernels.{name}: there is no operator of that name. {did_you_mean(str(name), known)}")
            continue
        backends = [dispatch.AUTO, *known[name]]
        if backend not in backends:
            hint = did_you_mean(str(backend), backends)
            problems.append(f"kernels.{name} is {backend!r}, and the operator has no such backend. {hint}")
        elif reason := _why_not(name, backend):
            problems.append(f"kernels.{name} is '{backend}', which cannot run on this machine because {reason}.")
        elif backend != dispatch.AUTO:
            chosen[name] = backend
    if problems:
        raise RequestError(problems)
    return chosen


def _why_not(name: str, backend: str) -> str | None:
    if backend in (dispatch.AUTO, dispatch.REFERENCE):
        return None  # without touching a GPU, which the process that only asks may leave alone
    return dispatch.reasons(name, torch.empty(0, device=pick_device()))[backend]


def use(chosen: Mapping[str, str]) -> AbstractContextManager[None]:
    """Within this, each operator runs with the backend that was chosen for it, every other with `auto`'s."""
    return configure({"*": dispatch.AUTO, **chosen})
