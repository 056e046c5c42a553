"""From a model directory to a model that can be put on the roster: weights, tokenizer, engine, thread.

How it is loaded is decided once for a server, so that a version that comes later runs as the first one did.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from deepwright_core import plugins
from deepwright_core.engine import CacheDtype, Engine
from deepwright_core.errors import RequestError
from deepwright_core.model.description import describe
from deepwright_core.model.directory import load_model, read_config
from deepwright_core.tokenizer import Tokenizer

from .limits import Limits
from .roster import Served
from .scheduling import EngineThread

CACHE_TOKENS = 65536


@dataclass(frozen=True)
class Loading:
    """device: auto, cpu, cuda or cuda:N. precision: auto, fp32 or bf16. cache_tokens: what the cache holds."""

    device: str = "auto"
    precision: str = "auto"
    cache_tokens: int = CACHE_TOKENS
    cache_dtype: CacheDtype = "auto"
    limits: Limits = field(default_factory=Limits)

    def load(self, directory: Path, name: str, version: str = "") -> Served:
        """Load a model directory; blocks for as long as that takes. `RequestError` when it cannot be served."""
        device, dtype = self.place()
        model = load_model(directory, plugins.installed().registry, device=device, dtype=dtype)
        tokenizer = Tokenizer.load(directory)
        engine = Engine(
            model,
            tokenizer.end_ids,
            cache_tokens=self.cache_tokens,
            max_batch=self.limits.running,
            cache_dtype=self.cache_dtype,
        )
        context = min(model.max_positions, engine.cache_capacity)
        thread = EngineThread(engine, self.limits)
        return Served(name, thread, tokenizer, context, version, directory=directory)

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where models go, and what their weights are; `RequestError` when this machine has no such device."""
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(auto if self.device == "auto" else self.device)
        except RuntimeError:
            raise RequestError(f"--device is '{self.device}'; expected auto, cpu, cuda or cuda:N.") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise RequestError(
                f"--device is '{self.device}'; this machine has {torch.cuda.device_count()} CUDA devices."
            )
        bf16 = device.type == "cuda" if self.precision == "auto" else self.precision == "bf16"
        return device, torch.bfloat16 if bf16 else torch.float32

    def bytes_of(self, directory: Path) -> int:
        """What a model will take beside others: its weights and its cache, without what a step needs for a moment."""
        _, dtype = self.place()
        registry = plugins.installed().registry
        facts = describe(registry, read_config(directory, registry))
        # The description counts two bytes a value.
        values = facts["parameters_total"] + facts["kv_bytes_per_token"] // 2 * self.cache_tokens
        return int(values * dtype.itemsize)
