"""What every request body is built of: strict, closed, bounded.

Strict: a string is no number. Closed: an unknown field is refused, not ignored, because a misspelt `max_token` that
does nothing is worse than an error.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from ..limits import MAX_STOP_LENGTH

NAME = Annotated[str, Field(min_length=1, max_length=256)]
STOP = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TOKEN = Annotated[int, Field(ge=0, lt=1 << 31)]
TOKENS = Annotated[list[TOKEN], Field(min_length=1)]


class Wire(BaseModel):
    """Base of what clients send."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Wrong(ValueError):
    """What is wrong with a field in view of the others. The sentence is the field's name and `rest`."""

    def __init__(self, field: str, rest: str) -> None:
        super().__init__(f"{field} {rest}")
        self.field = field
        self.rest = rest


def left_out_when_none(value: Any) -> bool:
    """For fields of replies that clients expect to be absent, not null, where there is nothing to say."""
    return value is None
