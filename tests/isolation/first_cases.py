"""A plugin of pytest: of every test function only the first of the cases that were chosen runs.

For a second run of tests elsewhere: what a function imports hangs on its lines, hardly ever on the numbers it is given.
"""

import pytest


@pytest.hookimpl(trylast=True)  # after -m
def pytest_collection_modifyitems(config, items):
    first = {}
    for item in items:
        first.setdefault((item.parent.nodeid, getattr(item, "originalname", None) or item.name), item)
    chosen = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
