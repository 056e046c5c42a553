"""Checkpoints that survive anything: written aside, checked by digest, the newest good one wins.

A checkpoint is a folder `step-00000100` with `model.safetensors`, `optimizer.safetensors` (state tensors and the random
generators), `state.json` (step, and what the stage wants to remember) and `digests.json` (the SHA-256 of the others).
Parameters that do not train are left out: whoever resumes has them from where the training started.
It appears under its name only when all of it lies on the disk. One that does not match its digests is passed over with
a warning.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..model.directory import distinct_tensors, load_weights
from ..stage import file_digest

PREFIX = "step-"
MODEL_FILE, OPTIMIZER_FILE, STATE_FILE = CONTENTS = ("model.safetensors", "optimizer.safetensors", "state.json")
DIGESTS_FILE = "digests.json"
CPU_RANDOM, CUDA_RANDOM = "random.cpu", "random.cuda"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def changing(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that want a gradient, and persistent buffers."""
    return {
        name: tensor
        for name, tensor in distinct_tensors(model).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors: `<parameter's place>.<state>`."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": torch.as_tensor(value).cpu() for index, s in state.items() for key, value in s.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put named tensors back into an optimizer over the same parameters."""
    document = optimizer.state_dict()
    document["state"] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        document["state"].setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict(document)


class Checkpoints:
    """The checkpoints of one stage, newest last; `keep` of them stay."""

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory, self.keep = directory, keep

    def saved(self) -> list[Path]:
        """Complete checkpoint folders, oldest first."""
        return sorted(self.directory.glob(f"{PREFIX}*")) if self.directory.is_dir() else []

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, memory: Mapping[str, Any]) -> Path:
        """Write a checkpoint after `step` steps. `memory` is JSON that the stage wants back."""
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"{PREFIX}{step:08d}"
        temporary = self.directory / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            kept = {name: tensor.detach().cpu().contiguous() for name, tensor in changing(model).items()}
            save_file(kept, temporary / MODEL_FILE)
            tensors = optimizer_tensors(optimizer) | {CPU_RANDOM: torch.get_rng_state()}
            if torch.cuda.is_available():
                tensors[CUDA_RANDOM] = torch.cuda.get_rng_state()
            save_file(tensors, temporary / OPTIMIZER_FILE)
            (temporary / STATE_FILE).write_text(json.dumps({"step": step, "memory": dict(memory)}))
            digests = {name: file_digest(temporary / name) for name in CONTENTS}
            (temporary / DIGESTS_FILE).write_text(json.dumps(digests))
            for file in temporary.iterdir():
                _sync(file)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            _sync(self.directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in self.saved()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, dict[str, Any]] | None:
        """Load the newest good checkpoint; returns (steps done, memory), or None when there is none."""
        for directory in reversed(self.saved()):
            problem = self._damage(directory)
            if problem:
                warnings.warn(
                    f"checkpoint {directory} is damaged ({problem}); going back to the one before", stacklevel=2
                )
                continue
            document = json.loads((directory / STATE_FILE).read_text())
            load_weights(model, directory / MODEL_FILE, changing(model))
            tensors = load_file(directory / OPTIMIZER_FILE)
            torch.set_rng_state(tensors.pop(CPU_RANDOM))
            cuda = tensors.pop(CUDA_RANDOM, None)
            if cuda is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(cuda)
            restore_optimizer(optimizer, tensors)
            return document["step"], document["memory"]
        return None

    @staticmethod
    def _damage(directory: Path) -> str | None:
        try:
            digests = json.loads((directory / DIGESTS_FILE).read_text())
            for name in CONTENTS:
                if file_digest(directory / name) != digests[name]:
                    return f"{name} does not match its digest"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return None
