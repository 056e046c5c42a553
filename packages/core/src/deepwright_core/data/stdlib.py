"""Real text that every machine has: the Python installation itself.

Three sorts of document: the language reference that `help()` shows, the docstrings of modules compiled from C (they
have no source to read), and the standard library's source files. The text depends on the Python version; for one
version it is always the same, and so is its order.

Left out, each for a reason: tests and idlelib (fixtures, not prose or library code), site-packages (not Python's own),
tables that a program wrote (code pages, topics that are already here as documents, build settings with this machine's
paths), and files that are not UTF-8.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from ..errors import RequestError
from ..registry import ComponentConfig
from .document import Document, Dropped, split_by_hash

SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"})
MACHINE_WRITTEN = ("encodings/", "pydoc_data/topics.py", "_sysconfigdata", "config-")
# Importing these does something to the process or needs a terminal or a display.
SKIPPED_MODULES = frozenset({"readline", "_tkinter", "_curses", "_curses_panel", "nis", "ossaudiodev", "spwd"})
SMALLEST = 64


class StdlibConfig(ComponentConfig):
    """The text of the running Python: documentation topics, docstrings, the standard library's source.

    max_bytes: how much text to take at most, both splits together.
    validation_share: share of the files that goes to validation, chosen by the hash of the file's path.
    """

    name: Literal["stdlib"] = "stdlib"
    max_bytes: int = Field(7_000_000, ge=10_000)
    validation_share: float = Field(0.05, gt=0, lt=1)


def read(config: StdlibConfig) -> Iterator[Document | Dropped]:
    """The text of the running Python installation, split by file into train and validation."""
    taken = 0
    for item in _everything():
        if isinstance(item, Dropped):
            yield item
            continue
        source, text = item
        size = len(text.encode())
        if size < SMALLEST:
            yield Dropped(source, "nearly empty")
        elif taken + size > config.max_bytes:
            yield Dropped(source, "beyond data.max_bytes")
        else:
            taken += size
            yield Document(text, source, split_by_hash(source, config.validation_share))
    if not taken:
        raise RequestError(
            "data: this Python installation has no readable text of its own (its standard library may be a zip file); "
            "use data=text with files of yours."
        )


def _everything() -> Iterator[tuple[str, str] | Dropped]:
    yield from _topics()
    yield from _compiled_docstrings()
    yield from _sources(Path(sysconfig.get_path("stdlib")))


def _topics() -> Iterator[tuple[str, str]]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it apart
        return
    for name in sorted(topics):
        yield f"topics/{name}", topics[name]


def _compiled_docstrings() -> Iterator[tuple[str, str]]:
    """One page for each compiled module: every public name's docstring, each docstring once."""
    seen: set[str] = set()
    for name in sorted(sys.stdlib_module_names):
        if name in SKIPPED_MODULES or name.startswith(("_test", "_xx", "xx")) or not _is_compiled(name):
            continue
        try:
            module = importlib.import_module(name)
        except Exception:  # a module whose system library is missing here
            continue
        page = [f"{name}\n{'=' * len(name)}"]
        for path, value in _members(module, name):
            text = inspect.getdoc(value)
            if isinstance(text, str) and len(text) > 20 and text not in seen:
                seen.add(text)
                page.append(f"{path}\n\n{text}")
        yield f"docstrings/{name}", "\n\n".join(page) + "\n"


def _is_compiled(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    if spec is None:
        return False
    return spec.origin == "built-in" or isinstance(spec.loader, importlib.machinery.ExtensionFileLoader)


def _members(module: object, name: str) -> Iterator[tuple[str, object]]:
    yield name, module
    for key in sorted(vars(module)):
        value = vars(module)[key]
        if key.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        yield f"{name}.{key}", value
        if inspect.isclass(value):
            for inner in sorted(vars(value)):
                if callable(vars(value)[inner]) or inspect.isdatadescriptor(vars(value)[inner]):
                    yield f"{name}.{key}.{inner}", vars(value)[inner]


def _sources(root: Path) -> Iterator[tuple[str, str] | Dropped]:
    """Source files in the order of their paths' hashes, so that a bound takes a fair sample and not the letter A."""
    paths = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    files = [path for path in paths if not SKIPPED_FOLDERS.intersection(path.split("/"))]
    for relative in sorted(files, key=lambda path: hashlib.sha256(f"order {path}".encode()).digest()):
        if relative.startswith(MACHINE_WRITTEN):
            yield Dropped(relative, "written by a program")
            continue
        try:
            yield relative, (root / relative).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            yield Dropped(relative, "not UTF-8")
        except OSError as error:
            yield Dropped(relative, f"unreadable: {error.strerror}")
