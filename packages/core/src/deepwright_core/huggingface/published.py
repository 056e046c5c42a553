"""A published directory as it is found: its config, its tensors, its FP8 scales, its tokenizer's files.

Opening one reads headers only and refuses what cannot be imported, with every problem at once. Code that the config
names (`auto_map`) is never looked at.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepwright_kernels import dequantise_fp8_blocks

from ..errors import RequestError
from ..model.tensor_files import DTYPES, TensorFiles

CONFIG_FILE = "config.json"
SCALE = "_scale_inv"  # of "X.weight": "X.weight_scale_inv"
WEIGHT_DTYPES = ("F32", "F16", "BF16", "F8_E4M3")
SCALE_DTYPES = ("F32", "F8_E8M0")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Values that every reader computes: old files have them.
COMPUTED = ("rotary_emb.inv_freq",)
LARGEST_JSON = 2**28


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping; `RequestError` when it is none."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise RequestError(f"{path} is larger than {LARGEST_JSON >> 20} MiB, which no such file is.")
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path.parent} has no {path.name}; expected the directory of a published model.") from None
    except (ValueError, RecursionError, OSError) as error:
        raise RequestError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(document, dict):
        raise RequestError(f"{path} holds a {type(document).__name__}; expected a mapping.")
    return document


class Published:
    """The directory's config and tensors. `tensors` leaves out the scales of FP8 weights, which belong to these."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise RequestError(f"{directory} is not a directory; name the directory of a published model.")
        self.directory = directory
        self.config = read_json(directory / CONFIG_FILE)
        self.block = self._block_size()
        self.files = TensorFiles(directory, ignore=COMPUTED)
        stored = self.files.tensors
        self.scales = {
            name: name + SCALE
            for name, tensor in stored.items()
            if tensor.dtype == "F8_E4M3" and name + SCALE in stored
        }
        mates = set(self.scales.values())
        self.tensors = {name: tensor for name, tensor in stored.items() if name not in mates}
        problems = [problem for name in self.tensors for problem in self._problems(name)]
        if problems:
            raise RequestError(problems)

    def _block_size(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        where = f"{self.directory / CONFIG_FILE}: quantization_config"
        quantised = self.config.get("quantization_config")
        if quantised is None:
            return 128, 128
        if not isinstance(quantised, dict):
            raise RequestError(f"{where} is {quantised!r}; expected a mapping.")
        method, size = quantised.get("quant_method"), quantised.get("weight_block_size", [128, 128])
        if method != "fp8":
            raise RequestError(f"{where}.quant_method is {method!r}, which is not supported; expected 'fp8'.")
        if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n >= 1 for n in size)):
            raise RequestError(f"{where}.weight_block_size is {size!r}; expected two sizes such as [128, 128].")
        return size[0], size[1]

    def _problems(self, name: str) -> list[str]:
        """What is wrong with one tensor by itself."""
        tensor = self.tensors[name]
        where = f"{self.directory / tensor.file}: '{name}'"
        if name.endswith(SCALE):
            return [f"{where} is the scale of no FP8 weight."]
        if tensor.dtype not in WEIGHT_DTYPES:
            return [f"{where} has dtype {tensor.dtype}; expected one of {', '.join(WEIGHT_DTYPES)}."]
        if tensor.dtype != "F8_E4M3":
            return []
        if len(tensor.shape) != 2:
            return [f"{where} is FP8 and has shape {list(tensor.shape)}; expected a matrix."]
        if name not in self.scales:
            return [f"{where} is FP8 and its scale '{name + SCALE}' is missing."]
        scale = self.files.tensors[self.scales[name]]
        blocks = tuple(-(-size // each) for size, each in zip(tensor.shape, self.block, strict=True))
        if scale.shape != blocks:
            return [f"{where} has a scale of shape {list(scale.shape)}; expected {list(blocks)}, one for each block."]
        if scale.dtype not in SCALE_DTYPES:
            return [f"{where} has a scale of dtype {scale.dtype}; expected one of {', '.join(SCALE_DTYPES)}."]
        return []

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that a tensor is read as: bfloat16 for FP8, which holds no more."""
        stored = self.tensors[name].dtype
        return torch.bfloat16 if stored == "F8_E4M3" else DTYPES[stored]

    def read(self, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows of a tensor. FP8 is multiplied out (`start` at the beginning of a block) and rounded once to `dtype`."""
        part = (slice(start, stop),)
        values = self.files.read(name, part)
        if name not in self.scales:
            return values
        rows = self.block[0]
        scales = self.files.read(self.scales[name], (slice(start // rows, -(-stop // rows)),))
        return dequantise_fp8_blocks(values, scales.float(), self.block, dtype)
