"""Checkpoints as others publish and load them: formats, reading into our model, writing out of it."""

from __future__ import annotations

from ..registry import Registry
from . import deepseek, llama
from .conversion import Converted
from .exporting import export_directory
from .importing import import_directory
from .memory import from_published, to_published

__all__ = [
    "Converted",
    "export_directory",
    "from_published",
    "import_directory",
    "register",
    "to_published",
]


def register(registry: Registry) -> None:
    """Add the formats of DeepSeek-V3, DeepSeek-V2, Llama and Qwen2."""
    deepseek.register(registry)
    llama.register(registry)
