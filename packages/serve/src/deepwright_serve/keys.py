"""API keys: read from a file, compared in constant time, asked for on every path but a short list.

A line of the file is a key and, behind it, what is known of its holder:

    k-4f9c2d6e7b8a9f01    name=alice requests-per-minute=60 tokens-per-minute=100000 concurrent=4

Left out: keys that expire (take the line out and send SIGHUP), and rights beyond "may ask".
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from deepwright_core.errors import RequestError, did_you_mean

from .tenants import Allowance, Tenant

SHORTEST = 16
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Limits as the file spells them -> fields of Allowance.
LIMITS = {field.name.replace("_", "-"): field.name for field in fields(Allowance)}
MOST = 10**9
# The chat page holds no secret, and a probe must not need one. Everything else is denied without a key.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})


@dataclass(frozen=True)
class _Entry:
    """One line of the file; the key itself only as its digest."""

    line: int
    digest: bytes
    name: str
    allowance: Allowance


class Keys:
    """The keys that open the server. Only their digests are kept."""

    def __init__(self, keys: Iterable[str], path: Path | None = None) -> None:
        self._path = path
        self._tenants: dict[bytes, Tenant] = {}
        self._take([_entry(number, key) for number, key in enumerate(keys, 1)])

    @classmethod
    def read(cls, path: Path) -> Keys:
        """One key a line, with its options; empty lines and lines that begin with # are skipped."""
        keys = cls([], path)
        keys.reload()
        return keys

    def reload(self) -> None:
        """Read the file again: new keys open, missing ones do not. `RequestError`: it is wrong, nothing has changed.

        The holder of a key that stays keeps what runs; its allowance begins anew only if it was changed.
        """
        if self._path is not None:
            self._take(_parse(self._path))

    def _take(self, entries: Sequence[_Entry]) -> None:
        before = self._tenants
        self._tenants = {}
        for entry in entries:
            tenant = before.get(entry.digest)
            if tenant is None:
                tenant = Tenant(entry.name, _salt(entry.digest), entry.allowance)
            elif tenant.allowance != entry.allowance:
                tenant.change(entry.allowance)
            tenant.name = entry.name
            self._tenants[entry.digest] = tenant

    def admit(self, authorization: str) -> Tenant | None:
        """Who sends this Authorization header, or None for nobody we know.

        Takes as long for a wrong key as for a right one.
        """
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found: Tenant | None = None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(digest, known):
                found = tenant
        return found if scheme.lower() == "bearer" else None


def _salt(digest: bytes) -> str:
    return hashlib.sha256(b"tenant" + digest).hexdigest()


def _entry(line: int, key: str, name: str = "", allowance: Allowance | None = None) -> _Entry:
    digest = hashlib.sha256(key.encode()).digest()
    # A name that tells keys apart in logs and tells nothing of the key.
    return _Entry(line, digest, name or f"key-{_salt(digest)[:8]}", allowance or Allowance())


def _parse(path: Path) -> list[_Entry]:
    """The file's entries; `RequestError` with everything that is wrong in it, by line, and never with a key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--api-key-file {path} cannot be read: {error}.") from None
    entries: list[_Entry] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        key, *options = words
        wrong = [f"the key has fewer than {SHORTEST} characters; use a longer one."] if len(key) < SHORTEST else []
        name, values = "", {}
        for option in options:
            label, is_option, value = option.partition("=")
            if not is_option:
                # Perhaps a second key: do not show it.
                wrong.append("behind the key stands something that is no option; write options as name=value.")
            elif label == "name" and NAME.fullmatch(value):
                name = value
            elif label == "name":
                wrong.append(f"name is '{value}'; expected at most 64 letters, digits, dots, dashes, underscores.")
            elif label not in LIMITS:
                known = ["name", *LIMITS]
                wrong.append(f"there is no option '{label}'. {did_you_mean(label, known)}")
            elif not (value.isascii() and value.isdigit() and len(value) < 11 and 1 <= int(value) <= MOST):
                wrong.append(f"{label} is '{value}'; expected a whole number from 1 to {MOST}.")
            else:
                values[LIMITS[label]] = int(value)
        entry = _entry(number, key, name, Allowance(**values))
        for other in entries:
            if other.digest == entry.digest:
                wrong.append(f"the key stands in line {other.line} already; keep one of them.")
            elif other.name == entry.name:
                wrong.append(f"the name '{name}' stands in line {other.line} already; give each key its own.")
        entries.append(entry)
        problems += [f"--api-key-file {path}, line {number}: {problem}" for problem in wrong]
    if not entries:
        problems.append(f"--api-key-file {path} holds no key; write one a line.")
    if problems:
        raise RequestError(problems)
    return entries
