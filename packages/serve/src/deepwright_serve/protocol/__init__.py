"""What goes over the wire: OpenAI's chat completions, completions and models, with DeepSeek's thinking fields.

One file a subject: `chat`, `completion`, what both share (`generation`), `usage`, `models`; `wire` holds the rules that
all requests keep.
"""

from __future__ import annotations

from .chat import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatReply,
    ChatRequest,
    ChunkChoice,
)
from .completion import CompletionReply, CompletionRequest, TextChoice
from .generation import FinishReason, GenerationRequest
from .models import ModelCard, ModelList, Status
from .usage import Usage

__all__ = [
    "AnswerMessage",
    "ChatChoice",
    "ChatChunk",
    "ChatReply",
    "ChatRequest",
    "ChunkChoice",
    "CompletionReply",
    "CompletionRequest",
    "FinishReason",
    "GenerationRequest",
    "ModelCard",
    "ModelList",
    "Status",
    "TextChoice",
    "Usage",
]
