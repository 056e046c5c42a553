"""From a model directory of ours to one that other programs load.

Config, weights and tokenizer get the names and fields that transformers, vLLM, SGLang and llama.cpp's converter read.
With `fp8`, matrices of attention and feed-forwards are stored in e4m3 with a scale for each block of 128 x 128, as
DeepSeek publishes them; embedding, head, norms, routers and MTP projections stay in bfloat16.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepwright_kernels import quantise_fp8_blocks

from ..errors import RequestError
from ..model.config import ModelConfig, MtpConfig
from ..model.directory import read_config
from ..model.tensor_files import DTYPES as STORED_DTYPES
from ..model.tensor_files import TensorFiles, differences
from ..registry import Registry
from ..tokenizer import Tokenizer
from ..tracking import Progress, SilentProgress
from .conversion import Converted, Plan, Step, fingerprint, refuse_existing, run
from .format import Format, format_for
from .importing import DTYPES, MOST_BYTES
from .memory import shapes_of
from .piece import Piece, cast, chunks
from .published import CONFIG_FILE, SCALE, TOKENIZER_FILES, read_json
from .streaming_files import Planned, StreamingFiles

BLOCK = (128, 128)
FP8 = "fp8"
SCALE_FORMATS = ("float32", "ue8m0")
GENERATION_FILE = "generation_config.json"
TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def export_directory(
    source: Path,
    destination: Path,
    registry: Registry,
    *,
    dtype: str = "keep",
    scale_format: str = "float32",
    without_mtp: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    most_bytes: int = MOST_BYTES,
) -> Converted:
    """Export a model directory.

    dtype: keep (as stored), bf16, fp16, fp32 or fp8. scale_format: of FP8 scales; ue8m0 rounds them up to powers of
    two. Raises `RequestError` when no published format can hold the model, `WorkError` when the disk fails.
    """
    if not dry_run:
        refuse_existing(destination)
    if dtype not in ("keep", FP8, *DTYPES):
        raise RequestError(f"dtype is {dtype!r}; expected one of keep, {', '.join(DTYPES)}, {FP8}.")
    if scale_format not in SCALE_FORMATS:
        raise RequestError(f"scale_format is {scale_format!r}; expected one of {', '.join(SCALE_FORMATS)}.")
    config = read_config(source, registry)
    files = TensorFiles(source)
    stored = {name: tensor.shape for name, tensor in files.tensors.items()}
    problems = differences(shapes_of(registry, config), stored, str(source))
    problems += [
        f"{source / tensor.file}: '{name}' has dtype {tensor.dtype}; expected F32, F16 or BF16."
        for name, tensor in files.tensors.items()
        if tensor.dtype not in ("F32", "F16", "BF16")
    ]
    if problems:
        raise RequestError(problems)
    notes = []
    if without_mtp and config.mtp.depth:
        notes.append(f"Left out {config.mtp.depth} module(s) of multi-token prediction.")
        config = config.model_copy(update={"mtp": MtpConfig()})
    format = format_for(config, registry)
    shapes = shapes_of(registry, config)
    pieces = [piece for piece in format.pieces(config, shapes) if piece.written]
    plan = _plan(source, files, format, config, pieces, dtype, scale_format, registry)
    if "tokenizer.json" not in plan.files:
        notes.append("There is no tokenizer.json: the exported directory has weights and config alone.")
    notes += format.caveats(config, registry, json.loads(plan.files.get("tokenizer.json", b"{}")))
    converted = Converted.by(plan, format.name, config, len(files.tensors), notes)
    if not dry_run:
        run(plan, destination, progress or SilentProgress(), most_bytes)
        files.close()
    return converted


def _plan(
    source: Path,
    files: TensorFiles,
    format: Format,
    config: ModelConfig,
    pieces: list[Piece],
    dtype: str,
    scale_format: str,
    registry: Registry,
) -> Plan:
    tensors: list[Planned] = []
    steps: list[Step] = []
    for piece in sorted(pieces, key=lambda piece: (files.tensors[piece.ours].file, piece.theirs)):
        if dtype == FP8 and piece.quantised:
            blocks = tuple(-(-size // each) for size, each in zip(piece.shape, BLOCK, strict=True))
            new = [
                Planned(piece.theirs, torch.float8_e4m3fn, piece.shape),
                Planned(piece.theirs + SCALE, torch.float32, blocks),
            ]
            work = partial(_quantise, files, piece, scale_format == "ue8m0")
        else:
            kind = piece.dtype or DTYPES.get("bf16" if dtype == FP8 else dtype) or _stored_dtype(files, piece)
            new = [Planned(piece.theirs, kind, piece.shape)]
            work = partial(_copy, files, piece, kind)
        tensors += new
        steps.append(Step(sum(tensor.bytes for tensor in new), work))
    kinds = {tensor.dtype for tensor in tensors if tensor.dtype in (torch.bfloat16, torch.float16)}
    main = kinds.pop() if len(kinds) == 1 else torch.float32
    document, small = _small_files(source, format, config, TORCH_NAMES[main], registry)
    if dtype == FP8:
        document["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": list(BLOCK),
            "activation_scheme": "dynamic",
            **({"scale_fmt": "ue8m0"} if scale_format == "ue8m0" else {}),
        }
    made_from = {
        "source": fingerprint([source / CONFIG_FILE, *files.files]),
        "dtype": dtype,
        "scale_format": scale_format,
        "config": document,
    }
    small[CONFIG_FILE] = (json.dumps(document, indent=2) + "\n").encode()
    return Plan(tensors, steps, small, made_from)


def _stored_dtype(files: TensorFiles, piece: Piece) -> torch.dtype:
    return STORED_DTYPES[files.tensors[piece.ours].dtype]


def _rows(files: TensorFiles, piece: Piece, start: int, stop: int) -> torch.Tensor:
    """Rows start..stop of a piece, from our file."""
    *before, last = piece.part or (slice(0, piece.shape[0]),)
    first = last.start if isinstance(last, slice) else 0
    return piece.to_theirs(files.read(piece.ours, (*before, slice(first + start, first + stop))))


def _copy(files: TensorFiles, piece: Piece, dtype: torch.dtype, out: StreamingFiles) -> None:
    width = torch.Size(piece.shape[1:]).numel()
    for start, stop in chunks(piece, BLOCK[0]):
        out.write(piece.theirs, start * width, cast(_rows(files, piece, start, stop), dtype, piece.ours))


def _quantise(files: TensorFiles, piece: Piece, power_of_two_scales: bool, out: StreamingFiles) -> None:
    width = piece.shape[1]
    scales_wide = -(-width // BLOCK[1])
    for start, stop in chunks(piece, BLOCK[0]):
        values = _rows(files, piece, start, stop)
        if not values.isfinite().all():
            raise RequestError(f"'{piece.ours}' has values that are not finite; they cannot be stored in FP8.")
        quantised, scales = quantise_fp8_blocks(values, BLOCK, power_of_two_scales)
        out.write(piece.theirs, start * width, quantised)
        out.write(piece.theirs + SCALE, start // BLOCK[0] * scales_wide, scales)


def _small_files(
    source: Path, format: Format, config: ModelConfig, dtype_name: str, registry: Registry
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """config.json as a document, and the tokenizer's files."""
    document: dict[str, Any] = {"architectures": [format.architecture], "model_type": format.name}
    document |= format.write(config, registry)
    document |= {"use_cache": True, "torch_dtype": dtype_name, "dtype": dtype_name}
    small = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    if "tokenizer.json" in small:
        tokenizer = Tokenizer.load(source)
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
        ids = {name: value for name, value in ids.items() if value is not None}
        document |= ids
        given = read_json(source / GENERATION_FILE) if GENERATION_FILE in small else {}
        small[GENERATION_FILE] = (json.dumps(ids | given, indent=2) + "\n").encode()
    return document, small
