"""Fine-tuning what exists: the model directory that a stage starts from, and which of its weights train."""

from ..registry import Registry
from . import full, lora


def register(registry: Registry) -> None:
    """Add the ways of fine-tuning `full` and `lora`."""
    registry.add("finetune", "full", config=full.FullConfig)(full.build)
    registry.add("finetune", "lora", config=lora.LoraConfig)(lora.build)
