"""Digests: of a stage's outputs, and of the code that made them.

The code that decides a stage's result is taken to be the sources of deepwright_core and deepwright_kernels, of the
package that provides the stage, and of the packages that provide the components its sections name. That is wider than
needed (a changed docstring counts), never narrower; documents, flows and the other packages do not count.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from deepwright_core.errors import WorkError
from deepwright_core.registry import Component, Registry
from deepwright_core.stage import file_digest

ALWAYS = ("deepwright_core", "deepwright_kernels")
SOURCES = {".py", ".cu", ".cuh"}


def files_of(path: Path) -> list[Path]:
    """The file itself, or every file of a directory, sorted."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file())


def record(path: Path) -> dict[str, dict[str, Any]]:
    """Size, time of change and SHA-256 of each file of an output, by its path relative to the output."""
    if not path.exists():
        raise WorkError(f"A stage says that it has written {path}, but it is not there.")
    entries: dict[str, dict[str, Any]] = {}
    for file in files_of(path):
        stat = file.stat()
        name = "" if file == path else file.relative_to(path).as_posix()
        entries[name] = {"size": stat.st_size, "changed": stat.st_mtime_ns, "sha256": file_digest(file)}
    return entries


def digest_of(entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest for an output, from the names and contents of its files."""
    text = "\n".join(f"{name}\0{entry['sha256']}" for name, entry in sorted(entries.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def damage(path: Path, entries: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with an output that was recorded, or None.

    A file with the recorded size and time of change is trusted; otherwise its content is read.
    """
    for name, entry in entries.items():
        file = path / name if name else path
        if not file.is_file():
            return f"{file} is gone"
        stat = file.stat()
        if stat.st_size != entry["size"]:
            return f"{file} has {stat.st_size} bytes instead of {entry['size']}"
        if stat.st_mtime_ns != entry["changed"] and file_digest(file) != entry["sha256"]:
            return f"{file} has changed since it was written"
    return None


@cache
def package_digest(package: str) -> str:
    """Digest of a top-level package's (or module's) sources, kernels in CUDA included."""
    origin: str | None
    module = sys.modules.get(package)
    origin = getattr(module, "__file__", None)
    if module is None:
        spec = importlib.util.find_spec(package)
        origin = spec.origin if spec else None
    if origin is None:
        return "unknown"
    file = Path(origin)
    files = [file]
    if file.name == "__init__.py":
        files = [path for path in files_of(file.parent) if path.suffix in SOURCES]
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(file.parent).as_posix()}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def plain(section: Any) -> Any:
    """A parsed section as JSON data."""
    return section.model_dump(mode="json") if isinstance(section, BaseModel) else section


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        name = value.get("name")
        if isinstance(name, str):
            yield name
        for item in value.values():
            yield from _names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)


def code_versions(component: Component, sections: Mapping[str, Any], registry: Registry) -> dict[str, str]:
    """Package -> digest of its code, distribution -> version, for everything that decides a stage's result."""
    named = set(_names(list(sections.values())))
    used = [component, *(c for c in registry if c.name in named and c.kind != "stage")]
    packages = set(ALWAYS)
    versions: dict[str, str] = {}
    for item in used:
        packages.add(item.build.__module__.split(".")[0])
        packages.add(item.config.__module__.split(".")[0])
        versions[f"distribution {item.provider.distribution}"] = item.provider.version
    packages -= {"builtins", "pydantic"}
    return {**versions, **{package: package_digest(package) for package in sorted(packages)}}
