"""The chat page: one file, and the policy that lets a browser run exactly its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Page:
    """What GET / answers."""

    html: str
    policy: str


def load() -> Page:
    """Read the page and derive its Content-Security-Policy from what it holds."""
    html = files(__name__).joinpath("index.html").read_text(encoding="utf-8")
    policy = [
        "default-src 'none'",
        f"script-src {_hashes(html, 'script')}",
        f"style-src {_hashes(html, 'style')}",
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


def _hashes(html: str, tag: str) -> str:
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
