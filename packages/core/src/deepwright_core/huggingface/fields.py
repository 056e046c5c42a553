"""Reading a published config.json: field by field, with a sentence for each that is missing, wrong or unsupported.

What is never asked for is remembered, so that the user hears which fields had no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ..errors import RequestError

Value = TypeVar("Value")
REQUIRED: Any = object()

# Fields that say nothing about the model's function: how a program was called, or where the file comes from.
WITHOUT_MEANING = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "pretraining_tp",
        "ep_size",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "attention_dropout",
        "router_aux_loss_coef",
        "head_dim",
        "qk_head_dim",
        "seq_aux",
        "num_local_experts",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "problem_type",
        "id2label",
        "label2id",
        "quantization_config",
    }
)


class Fields:
    """A config.json being read. Collects problems; `done` raises them all at once."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self.where, self.problems = where, list[str]()
        self._document = document
        self._asked: set[str] = set()

    def value(self, name: str, default: Any = REQUIRED) -> Any:
        """A field as it stands. A null counts as absent where there is a default."""
        self._asked.add(name)
        value = self._document.get(name)
        if value is None:
            if default is REQUIRED:
                self.problems.append(f"{self.where}: {name} is missing; expected a value.")
                return None
            return default
        return value

    def size(self, name: str, default: Any = REQUIRED, least: int = 1, most: int = 2**40) -> int:
        """A whole number from `least` to `most`."""
        value = self.value(name, default)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        if value is not None:
            self.problems.append(
                f"{self.where}: {name} is {value!r}; expected a whole number from {least} to {most:,}."
            )
        return least

    def number(self, name: str, default: Any = REQUIRED) -> float:
        """A finite number."""
        value = self.value(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf"):
            return float(value)
        if value is not None:
            self.problems.append(f"{self.where}: {name} is {value!r}; expected a number.")
        return 0.0

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.value(name, default)
        if not isinstance(value, bool):
            self.problems.append(f"{self.where}: {name} is {value!r}; expected true or false.")
            return default
        return value

    def only(self, name: str, supported: Sequence[Value], default: Value) -> Value:
        """One of the values that deepwright has code for; absent means `default`."""
        value = self.value(name, default)
        if value not in supported:
            wanted = " or ".join(repr(each) for each in supported)
            self.problems.append(f"{self.where}: {name} is {value!r}, which is not supported; expected {wanted}.")
            return default
        found: Value = value
        return found

    def ignored(self) -> list[str]:
        """Fields that may mean something and were not asked for."""
        return sorted(self._document.keys() - self._asked - WITHOUT_MEANING)

    def done(self) -> None:
        """Raise `RequestError` if there was any problem."""
        if self.problems:
            raise RequestError(self.problems)
