"""What form an answer must have: OpenAI's `response_format`, and vLLM's `structured_outputs` with its older spellings.

Left out: EBNF grammars and structural tags.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from ..limits import MAX_CHOICE_LENGTH, MAX_CHOICES_OF_FORM, MAX_REGEX_LENGTH
from .wire import Wire, Wrong

SCHEMA = dict[str, Any]
REGEX = Annotated[str, Field(min_length=1, max_length=MAX_REGEX_LENGTH)]
CHOICES = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_CHOICE_LENGTH)]],
    Field(min_length=1, max_length=MAX_CHOICES_OF_FORM),
]


class TextFormat(Wire):
    """Any text."""

    type: Literal["text"]


class JsonFormat(Wire):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(Wire):
    """A JSON schema with a name. It is kept to whether `strict` or not."""

    model_config = ConfigDict(validate_by_name=False, validate_by_alias=True)

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
    description: str | None = None
    schema_: SCHEMA | None = Field(None, alias="schema")
    strict: bool | None = None


class SchemaFormat(Wire):
    """JSON that is valid against a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


RESPONSE_FORMAT = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Wire):
    """Exactly one of: a JSON schema (an object, or its text), any JSON object, a regular expression, choices."""

    model_config = ConfigDict(validate_by_name=False, validate_by_alias=True)

    json_: SCHEMA | Annotated[str, Field(min_length=1)] | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: REGEX | None = None
    choice: CHOICES | None = None

    @model_validator(mode="after")
    def _one_form(self) -> StructuredOutputs:
        given = [self.json_, self.json_object, self.regex, self.choice]
        if sum(form is not None for form in given) != 1:
            raise Wrong("json", "is one of json, json_object, regex and choice; give exactly one of them.")
        return self
