"""What can be wrong with an override, said in one sentence that names it.

Hydra reports only the first problem and explains it for the people who write Hydra applications; here its messages
are read for the key in question, and the nearest keys that exist are offered. Values are not looked at: that is
validation's part.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

ENVIRONMENT = (
    "reading the environment with ${oc.env:...} is refused, because the resolved config is saved with "
    "the run and would show what the variable holds. Write the value itself."
)
_ENVIRONMENT_PATTERN = re.compile(r"\$\{\s*oc\.env\b")
_QUOTED = re.compile(r"'([^']*)'")
_MISSING_OPTION = re.compile(r"Could not (?:find|load) '([^']*)'")
_OPTION_IN_NEED = re.compile(r"In '([^']*)': Could not (?:find|load) '([^']*)'")


def refused(overrides: Sequence[str]) -> list[str]:
    """A sentence for each override that is not accepted whatever its value."""
    problems = []
    for override in overrides:
        if not isinstance(override, str) or not override.strip():
            problems.append(f"Override {override!r} is empty; expected key=value.")
        elif override.lstrip("+~").startswith(("hydra.", "hydra/")) or override.lstrip("+~").startswith("hydra="):
            problems.append(f"Override '{override}' changes Hydra itself, which is refused; give keys of the config.")
        elif _ENVIRONMENT_PATTERN.search(override):
            problems.append(f"Override '{override}': {ENVIRONMENT}")
        elif "=" not in override and not override.startswith("~"):
            problems.append(f"Override '{override}' has no value; expected key=value.")
    return problems


def key_of(override: str) -> str:
    """The key of an override: `++a.b@c=1` -> `a.b@c`."""
    return override.split("=", 1)[0].lstrip("+~")


def one_line(error: BaseException) -> str:
    """The message of an error in one line."""
    return " ".join(str(error).split())


def explain(
    error: BaseException, overrides: Sequence[str], known_keys: Callable[[], list[str]]
) -> tuple[str | None, str]:
    """(the override at fault or None, the sentence that says what is wrong with it)."""
    message = str(error)
    for cause in (error.__cause__, error.__context__):
        if cause is not None:
            message += "\n" + str(cause)
    culprit = _culprit(message, overrides)
    need = _OPTION_IN_NEED.search(message)
    if need and (culprit is None or not _chooses(culprit, need[2])):
        return culprit, (
            f"{need[1]} needs {need[2]}, and there is no such option. Is the plugin that provides it installed, and "
            "not left out by --block?"
        )
    if culprit is None:
        return None, one_line(error)
    key = key_of(culprit)
    if "Could not find" in message and "Available options" in message:
        listing = message.split("Available options", 1)[1].split("Config search path")[0].splitlines()[1:]
        options = [line.strip() for line in listing if line.strip()]
        value = culprit.split("=", 1)[1]
        return culprit, f"{key}={value}: there is no such option. {_near(value, options, everything=True)}"
    if "Could not override" in message or "No match in the defaults list" in message or "not in struct" in message:
        keys = known_keys()
        hint = _near_key(key, keys)
        return culprit, f"{key} is not in the config (override '{culprit}'). {hint}".strip()
    return culprit, f"Override '{culprit}': {one_line(error)}"


def _culprit(message: str, overrides: Sequence[str]) -> str | None:
    quoted = _QUOTED.findall(message)
    for override in overrides:
        if override in message:
            return override
    missing = _MISSING_OPTION.findall(message)
    for options in (missing, quoted):  # a group choice: the message quotes 'group/option', and perhaps who needs it
        for override in overrides:
            if any(_chooses(override, option) for option in options):
                return override
    for override in overrides:
        key = key_of(override)
        if key in quoted:
            return override
    for override in overrides:  # a key below a value that has no keys
        if key_of(override) in message:
            return override
    return None


def _chooses(override: str, option: str) -> bool:
    """Whether an override like `model/ffn@x.y=moe` chooses the option 'model/ffn/moe'."""
    key, _, value = override.partition("=")
    return f"{key.lstrip('+~').split('@')[0]}/{value}" == option


def _near(name: str, known: Sequence[str], everything: bool) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    listing = f"Known: {', '.join(sorted(known))}." if everything else ""
    return (hint + listing).strip()


def _near_key(key: str, keys: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, keys, n=3, cutoff=0.85)
    parent, _, leaf = key.rpartition(".")
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
    near += [f"{parent}.{s}".lstrip(".") for s in difflib.get_close_matches(leaf, siblings, n=3, cutoff=0.6)]
    same_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    near = list(dict.fromkeys([*near, *same_leaf]))[:3]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    if siblings and parent:
        return f"{parent} has: {', '.join(siblings)}."
    top = sorted({k.split(".")[0] for k in keys})
    return f"The sections are: {', '.join(top)}. `deepwright run pipeline --cfg` shows everything."
