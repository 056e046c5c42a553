"""What a request took: its tokens, under OpenAI's and DeepSeek's names."""

from __future__ import annotations

from pydantic import BaseModel


class CompletionTokensDetails(BaseModel):
    """Of the generated tokens, those that were thinking."""

    reasoning_tokens: int = 0


class PromptTokensDetails(BaseModel):
    """Of the prompt's tokens, those whose cache entries were already there."""

    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request, with OpenAI's and DeepSeek's names for what was cached."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def count(cls, prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Usage:
        """All fields from the four numbers behind them."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_cache_hit_tokens=cached,
            prompt_cache_miss_tokens=prompt - cached,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning),
        )
