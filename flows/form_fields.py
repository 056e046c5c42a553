"""The drop-downs of the run form: what can be chosen, and the overrides that a choice stands for.

Built once, at import, from conf/ and the installed plugins; after installing a plugin, `deepwright deploy` builds them
again. The empty choice means "as configured" and adds no override.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from deepwright_core.plugins import installed

from .compose import group_options

# field of the form -> group or key of the configuration
GROUPS = {
    "experiment": "experiment",
    "model": "model",
    "attention": "model/attention",
    "ffn": "model/ffn",
    "algorithm": "rl/algorithm",
    "finetune": "finetune",
    "init": "model.init",
}
PLAIN = re.compile(r"[\w./~-]+")


def _choices(group: str) -> Any:
    return Literal[("", *group_options(group, installed()))]


Experiment = _choices(GROUPS["experiment"])
Model = _choices(GROUPS["model"])
Attention = _choices(GROUPS["attention"])
FeedForward = _choices(GROUPS["ffn"])
Algorithm = _choices(GROUPS["algorithm"])
FineTune = _choices(GROUPS["finetune"])


def overrides_for(**chosen: str) -> list[str]:
    """`attention="mla"` -> `["model/attention=mla"]`; empty choices are left out."""
    return [f"{GROUPS[field]}={_quoted(value)}" for field, value in chosen.items() if value]


def _quoted(value: str) -> str:
    """As an override holds it: a path may have spaces and anything else in it."""
    return value if PLAIN.fullmatch(value) else "'" + value.replace("'", "\\'") + "'"
