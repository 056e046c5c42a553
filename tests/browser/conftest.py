"""A headless Chromium, and the fixtures of the server's own tests."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# The scripted engine and the servers around it stand beside the server's tests; here they are used as they are.
_place = Path(__file__).parents[1] / "serve" / "conftest.py"
_spec = importlib.util.spec_from_file_location("serve_fixtures", _place)
assert _spec is not None and _spec.loader is not None
_serve = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_serve)
tokenizer, serve_script = _serve.tokenizer, _serve.serve_script


# Not for the session: while it lives, Playwright keeps an event loop running that other tests would trip over.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()


def ask(page: Any, text: str = "What is 347 + 589?") -> None:
    """Write a message and send it."""
    page.fill("#question", text)
    page.keyboard.press("Enter")


def answered(page: Any, turns: int = 1) -> Any:
    """The last answer, once it is finished."""
    page.wait_for_function(
        "n => document.querySelectorAll('.turn.assistant').length === n && document.querySelector('.again')", arg=turns
    )
    return page.locator(".turn.assistant").last


@pytest.fixture
def new_page(browser: Any) -> Iterator[Any]:
    """Opens pages that must not log an error, must not break their own policy, and must ask nobody but their server."""
    complaints: list[str] = []
    contexts = []

    def open_page(server: Any, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((server.address, "data:"))
                else complaints.append(f"request to {request.url}")
            ),
        )
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.complaints = complaints
        page.goto(server.address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
