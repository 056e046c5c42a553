"""Rotary positions in published configs: `rope_parameters` in newer files, `rope_theta` and `rope_scaling` in others.

Both spellings are written, because each has readers that know only one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..model.config import RopeConfig
from .fields import Fields

# Ours to theirs.
YARN = {
    "factor": "factor",
    "original_positions": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
LLAMA3 = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_positions": "original_max_position_embeddings",
}
SCALINGS = {"yarn": YARN, "llama3": LLAMA3}
# A published yarn without these means: frequencies stretched, cos and sin scaled, the softmax left alone.
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}


def read_rope(fields: Fields) -> dict[str, Any]:
    """Our `rope` section."""
    parameters = fields.value("rope_parameters", {})
    scaling = fields.value("rope_scaling", {})
    theta = fields.value("rope_theta", None)
    if not isinstance(parameters, Mapping) or not isinstance(scaling, Mapping):
        fields.problems.append(f"{fields.where}: rope_parameters and rope_scaling: expected mappings.")
        return {}
    merged = {**scaling, **parameters}
    disagree = sorted(key for key in scaling.keys() & parameters.keys() if scaling[key] != parameters[key])
    if theta is not None and parameters.get("rope_theta", theta) != theta:
        disagree.append("rope_theta")
    if disagree:
        fields.problems.append(
            f"{fields.where}: rope_parameters and rope_scaling disagree about {', '.join(disagree)}; "
            "expected the same values in both."
        )
    inner = Fields({"rope_theta": theta, **merged}, f"{fields.where}: rope")
    kind = merged.get("rope_type", merged.get("type", "default"))
    rope: dict[str, Any] = {"theta": inner.number("rope_theta", 10000.0)}
    if kind in SCALINGS:
        names = SCALINGS[kind]
        defaults = YARN_DEFAULTS if kind == "yarn" else {}
        section: dict[str, Any] = {}
        for ours, theirs in names.items():
            read = inner.size if ours == "original_positions" else inner.number
            section[ours] = read(theirs, defaults[ours]) if ours in defaults else read(theirs)
        rope[kind] = section
        inner.only("attention_factor", (None,), None)
        inner.only("truncate", (True,), True)
    elif kind != "default":
        known = ", ".join(["default", *SCALINGS])
        inner.problems.append(
            f"{fields.where}: rope_type is {kind!r}, which is not supported; expected one of {known}."
        )
    fields.problems += inner.problems
    return rope


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """The fields of a published config."""
    for kind, names in SCALINGS.items():
        section = getattr(rope, kind)
        if section is not None:
            scaling = {theirs: getattr(section, ours) for ours, theirs in names.items()}
            return {
                "rope_theta": rope.theta,
                "rope_scaling": {"type": kind, "rope_type": kind, **scaling},
                "rope_parameters": {"rope_type": kind, "rope_theta": rope.theta, **scaling},
            }
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
    }
