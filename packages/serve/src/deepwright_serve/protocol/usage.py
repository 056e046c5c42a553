"""What a request took: its tokens, under OpenAI's and DeepSeek's names, and its price where prices are set."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from .wire import left_out_when_none

MILLION = 1_000_000


class Cost(BaseModel):
    """What a request costs, in the currency of the prices that the server was given."""

    input: float
    cached: float
    output: float
    total: float


class Prices(BaseModel):
    """Prices of a million tokens: of prompts, of what the prefix cache had of them, and of answers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0, allow_inf_nan=False)
    output: float = Field(ge=0, allow_inf_nan=False)
    cached: float | None = Field(None, ge=0, allow_inf_nan=False, description="default: as the rest of a prompt")

    def cost(self, missed: int, cached: int, completion: int) -> Cost:
        """The price of so many tokens."""
        price_cached = self.input if self.cached is None else self.cached
        parts = (missed * self.input / MILLION, cached * price_cached / MILLION, completion * self.output / MILLION)
        paid_in, paid_cached, paid_out = (round(part, 12) for part in parts)
        return Cost(input=paid_in, cached=paid_cached, output=paid_out, total=round(sum(parts), 12))


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
    cost: Cost | None = Field(None, exclude_if=left_out_when_none)

    @classmethod
    def count(
        cls, prompt: int, completion: int, cached: int = 0, reasoning: int = 0, prices: Prices | None = None
    ) -> Usage:
        """All fields from the four numbers behind them."""
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_cache_hit_tokens=cached,
            prompt_cache_miss_tokens=prompt - cached,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning),
            cost=None if prices is None else prices.cost(prompt - cached, cached, completion),
        )
