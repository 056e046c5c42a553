"""From a published directory to a model directory of ours.

Every tensor of the source and every parameter of the model must be matched exactly once; otherwise everything that is
missing, unexpected or mis-shaped is listed and nothing is written. The tokenizer's files are taken over as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from ..errors import RequestError
from ..model.config import ModelConfig, MtpConfig
from ..registry import Registry
from ..tokenizer import Tokenizer
from ..tracking import Progress, SilentProgress
from .conversion import Converted, Plan, Step, fingerprint, refuse_existing, run
from .format import Format
from .memory import read_config_document, shapes_of
from .piece import Piece, Shape, cast, chunks
from .published import CONFIG_FILE, TOKENIZER_FILES, Published
from .streaming_files import Planned, StreamingFiles

MOST_BYTES = 5 * 10**9
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LISTED = 40


def import_directory(
    source: Path,
    destination: Path,
    registry: Registry,
    *,
    dtype: str = "keep",
    without_mtp: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    most_bytes: int = MOST_BYTES,
) -> Converted:
    """Import a published directory.

    dtype: keep (as stored; FP8 becomes bf16), bf16, fp16 or fp32. without_mtp: leave multi-token prediction out.
    dry_run: check everything, write nothing. most_bytes: size of the weights' files.
    Raises `RequestError` listing what does not fit, `WorkError` when the disk fails.
    """
    if not dry_run:
        refuse_existing(destination)
    published = Published(source)
    format, config, ignored = read_config_document(published.config, registry, str(source / CONFIG_FILE))
    if config.layers > len(published.tensors):  # before anything is built for so many
        raise RequestError(
            f"{source / CONFIG_FILE}: num_hidden_layers is {config.layers:,}, "
            f"but the files hold {len(published.tensors):,} tensors in all."
        )
    dropped = format.mtp_prefixes(config.layers, config.mtp.depth) if without_mtp else ()
    if without_mtp:
        config = config.model_copy(update={"mtp": MtpConfig()})
    shapes = shapes_of(registry, config)
    pieces = format.pieces(config, shapes)
    theirs = {name: t.shape for name, t in published.tensors.items() if not name.startswith(dropped)}
    lost = _lost_mtp(format, config, theirs)
    problems = unmatched([piece for piece in pieces if not piece.theirs.startswith(lost)], theirs, source)
    if lost:
        problems.append(
            f"{source / CONFIG_FILE}: num_nextn_predict_layers is {config.mtp.depth}, but no tensor of these modules "
            "is there; import with --without-mtp to do without them."
        )
    if problems:
        raise RequestError(problems)
    notes = [f"config.json says {name}, which deepwright does not know and ignores." for name in ignored]
    if dropped:
        count = len(published.tensors) - len(theirs)
        notes.append(f"Multi-token prediction is left out; the source has {count or 'none'} of its tensors.")
    notes += ["config.json names code of its own (auto_map); it was not run."] * ("auto_map" in published.config)
    files, said = _small_files(source, config)
    plan = _plan(published, config, pieces, shapes, theirs, dtype, files)
    converted = Converted.by(plan, format.name, config, len(published.files.tensors), [*notes, *said])
    if not dry_run:
        run(plan, destination, progress or SilentProgress(), most_bytes)
        published.files.close()
    return converted


def unmatched(pieces: list[Piece], theirs: Mapping[str, Shape], source: Path) -> list[str]:
    """What keeps pieces and tensors from matching one to one: at most `LISTED` sentences of a kind, and a count."""
    wanted = {piece.theirs: piece for piece in pieces}
    missing = sorted(name for name, piece in wanted.items() if name not in theirs and not piece.optional)
    unexpected = sorted(theirs.keys() - wanted.keys())
    shaped = sorted(name for name in theirs.keys() & wanted.keys() if theirs[name] != wanted[name].shape)
    return [
        *_listed([f"{source}: '{name}' is missing." for name in missing], "missing"),
        *_listed([f"{source}: '{name}' has no place in the model." for name in unexpected], "unexpected"),
        *_listed(
            [
                f"{source}: '{name}' has shape {list(theirs[name])}; the config wants {list(wanted[name].shape)}."
                for name in shaped
            ],
            "mis-shaped",
        ),
    ]


def _listed(sentences: list[str], kind: str) -> list[str]:
    if len(sentences) <= LISTED:
        return sentences
    return [*sentences[:LISTED], f"… and {len(sentences) - LISTED} more that are {kind}, {len(sentences)} in all."]


def _lost_mtp(format: Format, config: ModelConfig, theirs: Mapping[str, Shape]) -> tuple[str, ...]:
    """Prefixes of multi-token prediction when the config tells of it and no tensor does: some programs drop them."""
    prefixes = format.mtp_prefixes(config.layers, config.mtp.depth)
    return () if any(name.startswith(prefixes) for name in theirs) else prefixes


def _plan(
    published: Published,
    config: ModelConfig,
    pieces: list[Piece],
    shapes: Mapping[str, Shape],
    theirs: Mapping[str, Shape],
    dtype: str,
    files: Mapping[str, bytes],
) -> Plan:
    """Which tensors are written, in what steps. Steps follow the source's files, so that each is opened once."""
    if dtype != "keep" and dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}; expected one of keep, {', '.join(DTYPES)}.")
    used = [piece for piece in pieces if piece.theirs in theirs and torch.Size(piece.shape).numel()]
    kinds: dict[str, torch.dtype] = {}
    for piece in used:
        if not piece.copy:
            kind = piece.dtype or DTYPES.get(dtype) or published.dtype(piece.theirs)
            kinds[piece.ours] = torch.promote_types(kinds.get(piece.ours, kind), kind)
    tensors = [Planned(name, kinds[name], shape) for name, shape in shapes.items()]
    # Copies come last: what they repeat is then known to be readable.
    used.sort(key=lambda piece: (piece.copy, published.tensors[piece.theirs].file, piece.theirs))
    originals = {piece.ours: piece for piece in pieces if not piece.copy}
    steps = [
        Step(0, partial(_compare, published, piece, originals[piece.ours]))
        if piece.copy
        else Step(
            torch.Size(piece.shape).numel() * kinds[piece.ours].itemsize,
            partial(_copy, published, piece, kinds[piece.ours]),
        )
        for piece in used
    ]
    document = {"model_type": "deepwright", **config.model_dump(exclude={"init"})}
    made_from = {
        "source": fingerprint([published.directory / CONFIG_FILE, *published.files.files]),
        "dtype": dtype,
        "config": document,
    }
    files = {**files, CONFIG_FILE: (json.dumps(document, indent=2) + "\n").encode()}
    return Plan(tensors, steps, files, made_from)


def _copy(published: Published, piece: Piece, dtype: torch.dtype, files: StreamingFiles) -> None:
    """One of their tensors into its place, chunk by chunk."""
    width = torch.Size(piece.shape[1:]).numel()
    for start, stop in chunks(piece, published.block[0]):
        values = piece.to_ours(published.read(piece.theirs, start, stop, dtype))
        files.write(piece.ours, piece.first + start * width, cast(values, dtype, piece.theirs))


def _compare(published: Published, copy: Piece, original: Piece, files: StreamingFiles) -> None:
    """A copy must say what its original says: the model has one tensor for both."""
    for start, stop in chunks(copy, published.block[0]):
        dtype = published.dtype(copy.theirs)
        first, second = (published.read(name, start, stop, dtype) for name in (copy.theirs, original.theirs))
        if not torch.equal(first.to(second.dtype), second):
            raise RequestError(
                f"'{copy.theirs}' differs from '{original.theirs}', but this model has one tensor for both."
            )


def _small_files(source: Path, config: ModelConfig) -> tuple[dict[str, bytes], list[str]]:
    """The tokenizer's files as they are, and what there is to say about them."""
    files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES if (source / name).is_file()}
    if "tokenizer.json" not in files:
        return files, ["There is no tokenizer.json: add one before serving or fine-tuning the model."]
    tokenizer = Tokenizer.load(source)
    if tokenizer.vocab_size > config.vocab_size:
        raise RequestError(
            f"{source / 'tokenizer.json'} has {tokenizer.vocab_size} tokens; "
            f"expected at most vocab_size of config.json, which is {config.vocab_size}."
        )
    return files, []
