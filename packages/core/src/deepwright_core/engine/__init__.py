"""The generation engine: sequences, blocks, scheduler, runner and sampler, each with one idea of its own."""

from .engine import Engine, EngineStats
from .grammar import Grammar, compile_grammar
from .runner import CacheDtype, GraphsOption
from .scores import TokenScore
from .sequence import Completion, SamplingParams, TokenEvent
from .speculation import MAX_DRAFTS
from .thinking import ThinkingControl

__all__ = [
    "MAX_DRAFTS",
    "CacheDtype",
    "Completion",
    "Engine",
    "EngineStats",
    "Grammar",
    "GraphsOption",
    "SamplingParams",
    "ThinkingControl",
    "TokenEvent",
    "TokenScore",
    "compile_grammar",
]
