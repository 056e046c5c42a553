"""What the tests of core share: a registry with core's own components, and no other plugin's."""

from __future__ import annotations

import pytest

from deepwright_core import plugin
from deepwright_core.registry import Registry


@pytest.fixture(scope="session")
def registry() -> Registry:
    registry = Registry()
    plugin.deepwright_register(registry)
    return registry
