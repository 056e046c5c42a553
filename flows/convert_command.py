"""`deepwright convert`: checkpoints in from others, and out to others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_plugins import block_option, load_plugins

if TYPE_CHECKING:
    from deepwright_core.huggingface import Converted

Command = Callable[..., Any]


def both_ways(command: Command) -> Command:
    """The options that import and export share, in the order of --help."""
    for option in (
        block_option,
        click.option("--json", "as_json", is_flag=True, help="The summary as JSON, on standard output."),
        click.option("--dry-run", is_flag=True, help="Check everything and write nothing."),
        click.option(
            "--shard-gb",
            type=click.FloatRange(min=0.0001),
            default=5.0,
            show_default=True,
            help="Largest size of one file of weights, in GB.",
        ),
        click.option("--without-mtp", is_flag=True, help="Leave the modules of multi-token prediction out."),
    ):
        command = option(command)
    return command


@click.group(short_help="Models in from other programs, and out to them.")
def convert() -> None:
    """Import a published checkpoint, or export a model so that other programs load it.

    Nothing is downloaded, overwritten or executed. Weights are streamed: memory holds a few tensors, not the model. A
    conversion that was cut off goes on when the same command is given again.
    """


@convert.command(
    "import",
    short_help="A published directory to a model directory of ours.",
    epilog="""\b
Examples:
  deepwright convert import ~/DeepSeek-V2-Lite runs/v2_lite
  deepwright convert import ~/DeepSeek-R1 runs/r1 --dry-run          headers only: does every tensor fit?
  deepwright convert import ~/Moonlight-16B-A3B runs/moonlight --dtype bf16

\b
Then:
  deepwright serve runs/v2_lite
  deepwright run sft model.init=runs/v2_lite finetune=lora

Reads config.json, *.safetensors and the tokenizer's files of DeepSeek-V2, V3, R1, Moonlight, Kimi K2, Llama and Qwen2
in bf16, fp16, fp32 and block-scaled FP8. Every tensor must fit exactly once; otherwise all that do not are listed and
nothing is written.""",
)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["keep", "bf16", "fp16", "fp32"]),
    default="keep",
    show_default=True,
    help="Of the written weights; keep: as they are stored, FP8 as bf16.",
)
@both_ways
def import_command(
    source: Path,
    destination: Path,
    dtype: str,
    without_mtp: bool,
    shard_gb: float,
    dry_run: bool,
    as_json: bool,
    block: tuple[str, ...],
) -> None:
    """Import the published model in SOURCE into the new directory DESTINATION."""
    from deepwright_core.huggingface import import_directory

    from .rich_progress import display

    registry = load_plugins(block).registry
    progress = display()
    progress.stage("import")
    began = time.monotonic()
    try:
        imported = import_directory(
            source.expanduser(),
            destination.expanduser(),
            registry,
            dtype=dtype,
            without_mtp=without_mtp,
            dry_run=dry_run,
            progress=progress,
            most_bytes=round(shard_gb * 1e9),
        )
    finally:
        progress.close()
    steps = [f"deepwright serve {destination}", f"deepwright run sft model.init={destination}"]
    facts = {"read": f"{imported.tensors_read:,} tensors as {imported.format}"}
    _report(imported, facts, source, destination, steps, dry_run, as_json, time.monotonic() - began)


@convert.command(
    "export",
    short_help="A model of ours to a directory that other programs load.",
    epilog="""\b
Examples:
  deepwright convert export runs/stages/rl-0123456789ab exported
  deepwright convert export deepwright@champion exported --dtype bf16
  deepwright convert export runs/v3 v3-fp8 --dtype fp8 --scale-format ue8m0

\b
Then, in Python:
  AutoModelForCausalLM.from_pretrained("exported"); AutoTokenizer.from_pretrained("exported")

Models with latent attention and experts are written as DeepSeek-V3 or V2, dense ones as Llama or Qwen2, with the
tokenizer, the chat template and the fields that transformers, vLLM, SGLang and llama.cpp's converter ask for.""",
)
@click.argument("source")
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["keep", "bf16", "fp16", "fp32", "fp8"]),
    default="keep",
    show_default=True,
    help="Of the written weights; keep: as they are stored; fp8: e4m3 with a scale for each block of 128 x 128.",
)
@click.option(
    "--scale-format",
    type=click.Choice(["float32", "ue8m0"]),
    default="float32",
    show_default=True,
    help="Of FP8 scales; ue8m0 rounds them up to powers of two.",
)
@both_ways
def export_command(
    source: str,
    destination: Path,
    dtype: str,
    scale_format: str,
    without_mtp: bool,
    shard_gb: float,
    dry_run: bool,
    as_json: bool,
    block: tuple[str, ...],
) -> None:
    """Export the model SOURCE into the new directory DESTINATION.

    SOURCE is a model directory, a stage's directory, a run id of the tracker or a registered name.
    """
    from deepwright_core.huggingface import export_directory

    from .model_source import locate
    from .rich_progress import display

    plugins = load_plugins(block)
    directory = locate(source, plugins)
    progress = display()
    progress.stage("export")
    began = time.monotonic()
    try:
        exported = export_directory(
            directory,
            destination.expanduser(),
            plugins.registry,
            dtype=dtype,
            scale_format=scale_format,
            without_mtp=without_mtp,
            dry_run=dry_run,
            progress=progress,
            most_bytes=round(shard_gb * 1e9),
        )
    finally:
        progress.close()
    facts = {"model": str(directory), "as": exported.format}
    _report(exported, facts, directory, destination, [], dry_run, as_json, time.monotonic() - began)


def _report(
    done: Converted,
    facts: Mapping[str, str],
    source: Path,
    destination: Path,
    next_steps: Sequence[str],
    dry_run: bool,
    as_json: bool,
    seconds: float,
) -> None:
    """What was done, for a person or as JSON."""
    from .rich_progress import duration, scaled

    if as_json:
        record: dict[str, Any] = {
            "format": done.format,
            "source": str(source),
            "destination": None if dry_run else str(destination),
            "dry_run": dry_run,
            "tensors_written": done.tensors_written,
            "bytes": done.bytes,
            "dtypes": dict(done.dtypes),
            "notes": list(done.notes),
            "seconds": round(seconds, 3),
        }
        click.echo(json.dumps(record, indent=1))
        return
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(done.dtypes.items()))
    lines = dict(facts)
    lines["would write" if dry_run else "wrote"] = (
        f"{done.tensors_written:,} tensors ({kinds}), {scaled(done.bytes, 'B')}"
        + ("" if dry_run else f", {destination}")
    )
    lines["took"] = duration(seconds)
    for name, text in lines.items():
        click.echo(f"{name:<12}{text}")
    for note in done.notes:
        click.echo(f"{'note':<12}{note}")
    if dry_run:
        click.echo(f"{'':<12}Every tensor fits. Nothing was written.")
    for step in next_steps if not dry_run else ():
        click.echo(f"{'next':<12}{step}")
