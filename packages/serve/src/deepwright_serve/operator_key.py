"""The operator's key: a file that both the server and whoever changes what it serves can read.

A file and not a word on the command line, where every user of the machine would see it. Left out: several operators
(give them the same file, or change the key between them).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from deepwright_core.errors import RequestError

from .keys import SHORTEST, Keys


def of_server(path: Path | None, models: Sequence[Path]) -> Keys | None:
    """What opens the operator's routes, or None when there are to be none. A missing key is made.

    models: the directories from below which models may be loaded; they must exist.
    """
    if path is None and not models:
        return None
    problems = [
        f"--admin-models is {directory}, which is no directory; name one that holds models."
        for directory in models
        if not directory.is_dir()
    ]
    if path is None:
        problems.append("--admin-models is of use only to an operator; give --admin-key-file as well.")
    if not models:
        problems.append(f"--admin-key-file is {path}; say with --admin-models from where models may be loaded.")
    if path is None or problems:
        raise RequestError(problems)
    if not path.exists():
        _make(path)
    return Keys([read(path)])


def read(path: Path) -> str:
    """The key in a file: its first line that is neither empty nor a comment."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--admin-key-file {path} cannot be read: {error}.") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if len(keys) != 1 or len(keys[0]) < SHORTEST or len(keys[0].split()) != 1:
        raise RequestError(
            f"--admin-key-file {path} must hold one key of at least {SHORTEST} characters; delete the file, and the "
            "server makes a good one."
        )
    return keys[0]


def _make(path: Path) -> None:
    """A new key that only this user can read."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{secrets.token_urlsafe(32)}\n")
    except FileExistsError:
        return  # another server was quicker; its key is as good
    except OSError as error:
        raise RequestError(f"--admin-key-file {path} cannot be written: {error.strerror}.") from None
