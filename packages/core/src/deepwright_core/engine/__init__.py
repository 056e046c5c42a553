"""The generation engine: sequences, blocks, scheduler, runner and sampler, each with one idea of its own."""

from .engine import Engine, EngineStats
from .runner import CacheDtype
from .sequence import Completion, SamplingParams, TokenEvent

__all__ = ["CacheDtype", "Completion", "Engine", "EngineStats", "SamplingParams", "TokenEvent"]
