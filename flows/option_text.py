"""What an option of a config group says of itself: the comment at the head of its YAML."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from deepwright_core.plugins import Plugins

from .compose import conf_directory, plugin_folders

_END_OF_SENTENCE = re.compile(r"(?<=\.)\s")


def first_sentence(group: str, name: str, plugins: Plugins) -> str:
    """The first sentence of the comment, without its full stop; "" where there is no YAML or no comment."""
    for folder in _folders(plugins):
        path = folder / group / f"{name}.yaml"
        if path.is_file():
            return _first_sentence(path.read_text(encoding="utf-8"))
    return ""


def _folders(plugins: Plugins) -> Iterator[Path]:
    yield conf_directory()
    for _, path in plugin_folders(plugins):
        if path.startswith("pkg://"):
            spec = importlib.util.find_spec(path.removeprefix("pkg://"))
            places = spec.submodule_search_locations if spec is not None else None
            yield from map(Path, places or ())
        else:
            yield Path(path.removeprefix("file://"))


def _first_sentence(text: str) -> str:
    lines = []
    for line in text.splitlines():
        words = line.lstrip("#").strip()
        if not line.startswith("#") or not words:
            break
        lines.append(words)
    return _END_OF_SENTENCE.split(" ".join(lines), maxsplit=1)[0].rstrip(".")
