"""For every test: an interrupt reaches the processes that tests start, and no test's blocked plugins reach the next.

Files that take minutes come first: with two processes, one of them would otherwise be left with such a file at the end.

A shell that starts the tests in the background makes them ignore SIGINT, and ignoring is inherited; a handler is not.
"""

import os
import signal
import sys
from collections.abc import Iterator

import pytest

signal.signal(signal.SIGINT, signal.default_int_handler)
BLOCK = "DEEPWRIGHT_BLOCK"
LONG = (
    "tests/e2e/",
    "tests/test_packaging.py",
    "tests/flows/",
    "tests/kernels/test_interpreter.py",
    "tests/browser/",
    "tests/serve/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture(autouse=True)
def plugins_as_before() -> Iterator[None]:
    """`--block` holds for a process and its children; a command called in this process must not leave it behind."""
    before = os.environ.get(BLOCK)
    yield
    if os.environ.get(BLOCK) != before:
        os.environ.pop(BLOCK)
        if before is not None:
            os.environ[BLOCK] = before
        if "deepwright_core.plugins" in sys.modules:
            sys.modules["deepwright_core.plugins"].installed.cache_clear()
