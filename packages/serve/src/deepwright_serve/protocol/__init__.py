"""What goes over the wire: OpenAI's chat completions, completions and models, with DeepSeek's thinking fields and
vLLM's extra ones.

One file a subject: `chat`, `completion`, what both share (`generation`), `tools`, `structured`, `scores`, `usage`,
`tokens`, `models`; `wire` holds the rules that all requests keep.
"""

from __future__ import annotations

from .chat import AnswerMessage, ChatChoice, ChatChunk, ChatFinishReason, ChatReply, ChatRequest, ChunkChoice
from .completion import CompletionReply, CompletionRequest, TextChoice
from .generation import FinishReason, GenerationRequest
from .models import ModelCard, ModelList, Status, Version
from .tokens import DetokenizeReply, DetokenizeRequest, TokenizeReply, TokenizeRequest
from .usage import Prices, Usage

__all__ = [
    "AnswerMessage",
    "ChatChoice",
    "ChatChunk",
    "ChatFinishReason",
    "ChatReply",
    "ChatRequest",
    "ChunkChoice",
    "CompletionReply",
    "CompletionRequest",
    "DetokenizeReply",
    "DetokenizeRequest",
    "FinishReason",
    "GenerationRequest",
    "ModelCard",
    "ModelList",
    "Prices",
    "Status",
    "TextChoice",
    "TokenizeReply",
    "TokenizeRequest",
    "Usage",
    "Version",
]
