"""The chat page: markup, style and scripts put together into one file, and the policy that lets just these run.

Each script holds one idea; they share one scope and are put together in the order of `SCRIPTS`. Left out: anything that
would have to be built, and anything that is not in this folder.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files

# Later ones use what earlier ones define.
SCRIPTS = ("elements", "markdown", "conversations", "asking", "turns", "controls")


@dataclass(frozen=True)
class Page:
    """What GET / answers."""

    html: str
    policy: str


def load() -> Page:
    """Put the page together, and derive its Content-Security-Policy from what it holds."""
    style = f"\n{_read('style.css')}"
    script = '\n"use strict";\n\n' + "\n".join(_read(f"{name}.js") for name in SCRIPTS)
    html = _read("index.html")
    html = html.replace("<style></style>", f"<style>{style}</style>", 1)
    html = html.replace("<script></script>", f"<script>{script}</script>", 1)
    policy = [
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Nothing may be turned into markup, the model's output least of all.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return Page(html, "; ".join(policy))


def _read(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
