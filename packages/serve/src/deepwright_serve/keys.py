"""API keys: read from a file, compared in constant time, asked for on every path but a short list."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from deepwright_core.errors import RequestError

SHORTEST = 16
# The chat page holds no secret, and a probe must not need one. Everything else is denied without a key.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})


class Keys:
    """The keys that open the server. Only their digests are kept."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """One key a line; empty lines and lines that begin with # are skipped."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--api-key-file {path} cannot be read: {error}.") from None
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise RequestError(f"--api-key-file {path} holds no key; write one a line.")
        short = [number for number, key in enumerate(keys, 1) if len(key) < SHORTEST]
        if short:
            raise RequestError(
                f"--api-key-file {path}: key {short[0]} has fewer than {SHORTEST} characters; use a longer one."
            )
        return cls(keys)

    def admit(self, authorization: str) -> str | None:
        """Who sends this Authorization header (a name derived from the key), or None for nobody we know.

        Takes as long for a wrong key as for a right one.
        """
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return hashlib.sha256(b"tenant" + digest).hexdigest() if found and scheme.lower() == "bearer" else None
