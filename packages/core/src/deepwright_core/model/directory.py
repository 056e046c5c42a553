"""A model directory: `config.json`, `model.safetensors`, and the tokenizer's files beside them.

Written so that a reader sees a whole directory or none; read without executing anything. A large model's weights may
lie in several files with an index (`tensor_files`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import RequestError
from ..registry import Registry, parse
from ..stage import RESULT_FILE, write_atomically
from .config import ModelConfig
from .tensor_files import WEIGHTS_FILE, TensorFiles, differences
from .transformer import Transformer, build_model

CONFIG_FILE = "config.json"


def distinct_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, as they are, each once (a tied head stands under the embedding)."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, ready to be saved."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in distinct_tensors(model).items()}


def load_weights(model: nn.Module, path: Path, wanted: Mapping[str, torch.Tensor] | None = None) -> None:
    """Load a safetensors file into a model; every tensor on both sides must be matched exactly once.

    wanted: the tensors of the model that the file should hold (default: all of them).
    Raises `RequestError` listing what is missing, unexpected or of another shape; the model is then unchanged.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RequestError(f"{path} cannot be read: {error}.") from None
    problems = differences(_shapes(distinct_tensors(model) if wanted is None else wanted), _shapes(stored), str(path))
    if problems:
        raise RequestError(problems)
    model.load_state_dict(stored, strict=False)  # not strict: a tied head stands once in the file


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def save_model(model: Transformer, directory: Path) -> None:
    """Write config and weights of a model into a directory (created if need be)."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{WEIGHTS_FILE}.tmp"
    save_file(weights(model), temporary, metadata={"format": "pt"})
    temporary.replace(directory / WEIGHTS_FILE)
    document = {"model_type": "deepwright", **model.config.model_dump()}
    write_atomically(directory / CONFIG_FILE, json.dumps(document, indent=2) + "\n")


def read_config(directory: Path, registry: Registry) -> ModelConfig:
    """The validated config of a model directory; `RequestError` when it is not one."""
    path = directory / CONFIG_FILE
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise RequestError(f"{directory} is not a model directory: it has no {CONFIG_FILE}.") from None
    except json.JSONDecodeError as error:
        raise RequestError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise RequestError(f"{path} holds a {type(document).__name__}; expected a mapping with a model's config.")
    model_type = document.pop("model_type", None)
    if model_type != "deepwright":
        raise RequestError(f"{path}: model_type is {model_type!r}; expected 'deepwright'.")
    return parse(ModelConfig, document, str(path), registry)


def load_model(
    directory: Path,
    registry: Registry,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    share: Callable[[Transformer], Mapping[str, slice]] | None = None,
) -> Transformer:
    """Load a model directory, in evaluation mode. `dtype` casts the parameters (buffers stay float32).

    share: makes a rank's part of the built model, and tells which part of the first dimension of which tensors that is.
    """
    config = read_config(directory, registry)
    files = TensorFiles(directory)
    model = build_model(registry, config)
    parts = {} if share is None else share(model)
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    wanted = distinct_tensors(model)
    stored = {name: _part(tensor.shape, parts.get(name)) for name, tensor in files.tensors.items()}
    problems = differences(_shapes(wanted), stored, str(directory))
    if problems:
        raise RequestError(problems)
    with torch.no_grad():
        for name in sorted(wanted, key=lambda name: files.tensors[name].file):
            wanted[name].copy_(files.read(name, (parts[name],) if name in parts else ()))
    files.close()
    return model.to(device).eval()


def _part(shape: tuple[int, ...], part: slice | None) -> tuple[int, ...]:
    return shape if part is None else (len(range(shape[0])[part]), *shape[1:])


@torch.no_grad()
def replace_weights(model: nn.Module, source: Path | Mapping[str, torch.Tensor]) -> None:
    """Write the weights of a model directory, or tensors by name, over those of a model, in place and in its dtypes.

    Every tensor on both sides must be matched exactly once (a `state_dict` may name one twice); `RequestError` lists
    what is not, and nothing is changed.
    """
    wanted = distinct_tensors(model)
    names = list(wanted)
    if isinstance(source, Path):
        files = TensorFiles(source)
        stored: Mapping[str, tuple[int, ...]] = {name: tensor.shape for name, tensor in files.tensors.items()}
        read: Callable[[str], torch.Tensor] = files.read
        names.sort(key=lambda name: files.tensors[name].file if name in files.tensors else "")
    else:
        # A state_dict has a tied head under both its names.
        known = {tensor.data_ptr() for name, tensor in source.items() if name in wanted}
        given = {name: t for name, t in source.items() if name in wanted or t.data_ptr() not in known}
        stored, read = _shapes(given), given.__getitem__
    problems = differences(_shapes(wanted), stored, str(source) if isinstance(source, Path) else "the given weights")
    if problems:
        raise RequestError(problems)
    for name in names:
        wanted[name].copy_(read(name))


def find_model(path: Path) -> Path:
    """The model directory that a path means: itself, or the model that a stage left in its directory."""
    if (path / "config.json").is_file():
        return path
    if not path.exists():
        raise RequestError(f"{path} does not exist; give a model directory or the directory of a finished stage.")
    result = path / RESULT_FILE
    candidates = [path / "model"]
    if result.is_file():
        try:
            outputs = json.loads(result.read_text()).get("outputs", {})
            candidates += [path / relative for relative in outputs.values()]
        except (ValueError, AttributeError):
            raise RequestError(f"{result} is not a stage's result: it is not the JSON of one.") from None
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return candidate
    raise RequestError(
        f"{path} holds no model: there is no config.json in it, nor in a model/ below it. "
        "Give a model directory or the directory of a finished stage."
    )
