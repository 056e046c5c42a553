"""The LoRA adapters of an engine: read from their directories, checked, and put on the model beside each other.

An adapter has a number that is never used again; sequences carry it, rows of a batch select by it, and it is part of
the root of their prefixes. The model's own weights stay as they are, so requests without an adapter are answered by
the base. While none is loaded, nothing of this is on the model.

Left out: adapters with rows for new tokens (all requests share one vocabulary; serve the merged model), and other ways
of fine-tuning than LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..errors import RequestError
from ..finetune import adapter_files, targets
from ..finetune.lora import LoraConfig
from ..model.correction import Correction, Selection, correct
from ..model.tensor_files import TensorFiles

COLUMNS = 16
"""Columns come in multiples of this: grouped products want rows that begin at multiples of 16 bytes."""


@dataclass(frozen=True)
class Factors:
    """a [..., R, K] and b [..., N, R] of one matrix, in the weights' dtype; b has the scale in it."""

    a_RK: Tensor
    b_NR: Tensor


@dataclass(frozen=True)
class LoadedAdapter:
    """factors: by the path of the matrix."""

    number: int
    factors: Mapping[str, Factors]


class Adapters:
    """What is loaded, by name."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._loaded: dict[str, LoadedAdapter] = {}
        self._next = 1
        self._handles: list[Any] = []
        self._selection = Selection()

    def __bool__(self) -> bool:
        return bool(self._loaded)

    @property
    def names(self) -> list[str]:
        """The loaded ones."""
        return list(self._loaded)

    def number(self, name: str) -> int:
        """The number of an adapter, 0 for the name "" (none)."""
        if not name:
            return 0
        if name not in self._loaded:
            here = ", ".join(self._loaded) or "none"
            raise RequestError(f"adapter is '{name}', which is not loaded; loaded: {here}.")
        return self._loaded[name].number

    def select(self, adapter_B: Tensor) -> None:
        """The next call of the model is for sequences with these adapters."""
        self._selection.adapter_B = adapter_B

    def load(self, name: str, directory: Path, base: Path | None) -> None:
        """See `Engine.load_adapter`."""
        if not name or name in self._loaded:
            problem = "is loaded already; drop it first, or choose another name" if name else "is empty"
            raise RequestError(f"The adapter's name '{name}' {problem}.")
        section, digest, stored = adapter_files.read(directory)
        try:
            config = LoraConfig.model_validate(section)
        except ValidationError as error:
            raise RequestError(f"{directory} is no adapter that an engine can load: {error}.") from None
        chosen = targets.chosen(self._model, config.targets)
        problems = self._problems(chosen, stored, config.rank, str(directory))
        if not problems and self._digest(chosen, base) != digest:
            problems = [_other_weights(directory, base, chosen)]
        if problems:
            raise RequestError(problems)
        scale = config.alpha / config.rank
        factors = {
            path: Factors(
                stored[f"{path}.a_RK"].to(weight),
                (stored[f"{path}.b_NR"].to(weight.device, torch.float32) * scale).to(weight.dtype),
            )
            for path, weight in chosen.items()
        }
        self._loaded[name] = LoadedAdapter(self._next, factors)
        self._next += 1
        self._install()

    def drop(self, name: str) -> None:
        """Forget an adapter."""
        self.number(name)
        del self._loaded[name]
        self._install()

    def _problems(self, chosen: Mapping[str, Tensor], stored: Mapping[str, Tensor], rank: int, where: str) -> list[str]:
        """What keeps factors from fitting this model, a sentence each."""
        rows = sorted(name for name in stored if name.endswith(".rows_XK"))
        problems = []
        if rows:
            problems.append(
                f"{where} holds rows for new tokens ({', '.join(rows)}), and an engine's requests share one "
                "vocabulary; serve the merged model instead."
            )
        wanted = {}
        for path, weight in chosen.items():
            *stack, outputs, inputs = weight.shape
            wanted[f"{path}.a_RK"] = (*stack, rank, inputs)
            wanted[f"{path}.b_NR"] = (*stack, outputs, rank)
        for name in sorted({*wanted, *stored} - {*rows}):
            if name not in wanted:
                problems.append(f"{where}: '{name}' belongs to no matrix of the model.")
            elif name not in stored:
                problems.append(f"{where}: '{name}' is missing.")
            elif tuple(stored[name].shape) != wanted[name]:
                shape = list(stored[name].shape)
                problems.append(f"{where}: '{name}' has shape {shape}; the model wants {list(wanted[name])}.")
        return problems

    def _digest(self, chosen: Mapping[str, Tensor], base: Path | None) -> str:
        """Of the adapted weights in float32, as training saw them."""
        if base is None:
            return adapter_files.digest_of({path: weight.float() for path, weight in chosen.items()})
        files = TensorFiles(base)
        try:
            return adapter_files.digest_of({path: files.read(path).float() for path in chosen})
        except KeyError as error:
            raise RequestError(f"{base} has no tensor {error}, which the model has.") from None
        finally:
            files.close()

    def _install(self) -> None:
        """Put what is loaded on the model, in place of what was there."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        paths = dict.fromkeys(path for adapter in self._loaded.values() for path in adapter.factors)
        uncorrected = []
        for path in paths:
            handles = correct(self._model, path, self._correction(path))
            self._handles += handles
            uncorrected += [path] * (not handles)
        if uncorrected:
            self._loaded.popitem()
            self._install()
            raise RequestError(
                f"The adapter changes {', '.join(uncorrected)}, which its module multiplies by itself and cannot "
                "correct for single requests; serve the merged model instead."
            )

    def _correction(self, path: str) -> Correction:
        parts = [
            (adapter.number, adapter.factors[path]) for adapter in self._loaded.values() if path in adapter.factors
        ]
        a = torch.cat([factors.a_RK for _, factors in parts], -2)
        b = torch.cat([factors.b_NR for _, factors in parts], -1)
        owners = [number for number, factors in parts for _ in range(factors.a_RK.shape[-2])]
        gap = -len(owners) % COLUMNS
        a, b = nn.functional.pad(a, (0, 0, 0, gap)), nn.functional.pad(b, (0, gap))
        owner_X = torch.tensor(owners + [-1] * gap, device=a.device)
        return Correction(a, b, owner_X, self._selection)


def _other_weights(directory: Path, base: Path | None, chosen: Mapping[str, Tensor]) -> str:
    narrow = sorted({str(weight.dtype) for weight in chosen.values() if weight.dtype != torch.float32})
    if base is None and narrow:
        return (
            f"{directory} cannot be checked against weights in {', '.join(narrow)}, to which they may have been "
            "rounded; give `base`, the model directory that they were loaded from."
        )
    held = base or "the engine"
    return f"{directory} was trained on other weights than {held} holds; give it the model that it started from."
