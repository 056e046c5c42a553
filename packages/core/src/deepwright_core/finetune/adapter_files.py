"""An adapter on the disk: `adapter.safetensors` with the factors, `adapter_config.json` with what they belong to.

The config carries a digest of the weights that were adapted: an adapter never goes on another model unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import RequestError
from ..stage import write_atomically

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter.safetensors"
FORMAT = 1


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}\0{plain.dtype}\0{list(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(directory: Path, config: BaseModel, adapted: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
    """adapted: the weights as they were given, by path."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{WEIGHTS_FILE}.tmp"
    save_file({name: t.detach().cpu().contiguous() for name, t in factors.items()}, temporary, {"format": "pt"})
    temporary.replace(directory / WEIGHTS_FILE)
    document = {"format": FORMAT, "finetune": config.model_dump(mode="json"), "adapted": digest_of(adapted)}
    write_atomically(directory / CONFIG_FILE, json.dumps(document, indent=2) + "\n")


def find_adapter(path: Path) -> Path:
    """The adapter's directory that a path means: itself, or the one that a stage left in its directory."""
    below = path / "adapter"
    return below if not (path / CONFIG_FILE).is_file() and (below / CONFIG_FILE).is_file() else path


def read(directory: Path) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    """(the finetune section, the digest of the weights that were adapted, the factors)."""
    path = directory / CONFIG_FILE
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    if missing:
        raise RequestError(f"{directory} is not an adapter: it has no {' and no '.join(missing)}.")
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise RequestError(f"{path} is of format {document['format']!r}; expected {FORMAT}.")
        return dict(document["finetune"]), str(document["adapted"]), load_file(directory / WEIGHTS_FILE)
    except RequestError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RequestError(f"{directory} cannot be read as an adapter: {type(error).__name__}: {error}.") from None
