"""What the tests of moe share: a registry with core's and moe's components."""

from __future__ import annotations

import pytest

from deepwright_core import plugin as core
from deepwright_core.registry import Registry
from deepwright_moe import plugin as moe


@pytest.fixture(scope="session")
def registry() -> Registry:
    registry = Registry()
    core.deepwright_register(registry)
    moe.deepwright_register(registry)
    return registry
