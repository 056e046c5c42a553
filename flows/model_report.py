"""A model's figures as a page for people. All of them come from `deepwright_core.model.description.describe`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 120
UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "K"))
BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
FLOPS = ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"))
NAMES = {
    "dense_ffn": "dense feed-forward",
    "routed_experts": "routed experts",
    "shared_experts": "shared experts",
}

Row = Sequence[str]


def _scaled(value: float, units: Sequence[tuple[float, str]], plain: str = "") -> str:
    """Two decimals and a unit: 671.03 B, 70.27 kB."""
    for scale, unit in units:
        if value >= scale:
            return f"{value / scale:,.2f} {unit}"
    return f"{value:,.0f} {plain}".rstrip()


def count(value: float) -> str:
    return _scaled(value, UNITS)


def size(value: float) -> str:
    return _scaled(value, BYTES, "B")


def flops(value: float) -> str:
    return _scaled(value, FLOPS, "FLOP")


def show(name: str, sentence: str, facts: dict[str, Any]) -> None:
    """Print everything, on a terminal with emphasis and elsewhere as plain text."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    with console.capture() as page:
        _render(console, name, sentence, facts)
    click.echo("\n".join(line.rstrip() for line in page.get().splitlines()))


def _render(console: Console, name: str, sentence: str, facts: dict[str, Any]) -> None:
    console.print(Text(name, style="bold"))
    sizes = (
        f"{facts['layers']} layers of width {facts['hidden_size']:,}, {facts['vocab_size']:,} tokens in the "
        f"vocabulary, contexts of up to {facts['max_positions']:,} tokens."
    )
    for line in (f"{sentence}." if sentence else "", sizes):
        _paragraph(console, line)
    for title, columns, rows, notes in (
        _parameters(facts),
        *([_experts(facts)] if facts["experts"] else []),
        _cache(facts),
        _arithmetic(facts),
        _memory(facts),
    ):
        table = Table(box=None, pad_edge=False, show_header=any(columns), header_style="dim")
        for index, column in enumerate(columns):
            table.add_column(Text(column), justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print()
        console.print(Text(title, style="bold"))
        console.print(Padding(table, (0, 0, 0, 2), expand=False))
        for note in notes:
            _paragraph(console, note, style="dim")


def _paragraph(console: Console, text: str, style: str = "") -> None:
    width = min(console.width, WIDTH)
    for line in textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  "):
        console.print(Text(line, style=style), soft_wrap=True)


Section = tuple[str, Sequence[str], list[Row], list[str]]


def _parameters(facts: dict[str, Any]) -> Section:
    rows: list[Row] = [
        (NAMES.get(part, part), count(weights["total"]), count(weights["active"]))
        for part, weights in facts["parts"].items()
        if weights["total"]
    ]
    rows.append(("all", count(facts["parameters_total"]), count(facts["parameters_active"])))
    rows.append(
        (
            "without embedding and head",
            count(facts["parameters_total_without_embeddings"]),
            count(facts["parameters_active_without_embeddings"]),
        )
    )
    total, active = facts["parameters_total"], facts["parameters_active"]
    working = "all of them" if active == total else f"{active:,} of them"
    notes = [f"Exactly {total:,}; {working} work for a token."]
    if facts["tied_head"]:
        notes.append("The head is tied: it is the embedding.")
    mtp = facts["mtp"]
    if mtp["depth"]:
        modules = "1 module" if mtp["depth"] == 1 else f"{mtp['depth']} modules"
        rows.append((f"multi-token prediction, {modules}", count(mtp["parameters"]), ""))
        rows.append(("all as checkpoints count", count(facts["parameters_total_with_mtp_copies"]), ""))
        notes.append("Checkpoints hold, in each multi-token module, a copy of embedding and head.")
    return "Parameters", ("", "total", "for a token"), rows, notes


def _experts(facts: dict[str, Any]) -> Section:
    experts = facts["experts"]
    rows: list[Row] = [
        ("routed experts in a layer", f"{experts['routed']:,}"),
        ("of these for a token", f"{experts['top_k']:,}"),
        ("shared experts", f"{experts['shared']:,}"),
        ("parameters of an expert", count(experts["parameters_each"])),
        ("layers that have experts", f"{experts['layers']} of {facts['layers']}"),
        ("sparsity, routed / for a token", f"{experts['sparsity']:.4g}"),
        ("share of all parameters that works for a token", f"{experts['active_share']:.2%}"),
    ]
    return "Experts", ("", ""), rows, []


def _cache(facts: dict[str, Any]) -> Section:
    cache = facts["kv_cache"]
    kinds = {
        "model": ("this model", facts["kv_bytes_per_token"]),
        "gqa": (
            f"GQA with {cache['gqa_kv_heads']} key-value heads",
            facts["kv_bytes_per_token_gqa"],
        ),
        "mha": ("MHA", facts["kv_bytes_per_token_mha"]),
    }
    lengths = [f"{context['tokens']:,} tokens" for context in cache["contexts"]]
    rows: list[Row] = [
        (
            label,
            f"{per_token:,} B",
            *(size(context[kind]) for context in cache["contexts"]),
            f"{per_token / facts['kv_bytes_per_token']:.1f} x",
        )
        for kind, (label, per_token) in kinds.items()
        if per_token is not None
    ]
    notes = ["The others have as many query heads, of the same widths."]
    return f"Key-value cache, {cache['dtype']}", ("", "a token", *lengths, ""), rows, notes


def _arithmetic(facts: dict[str, Any]) -> Section:
    rows: list[Row] = [
        ("prefill, the last token", flops(facts["flops_per_token"])),
        ("decoding the next token", flops(facts["flops_per_token_decode"])),
        ("training, average token", flops(facts["flops_per_token_training"])),
    ]
    notes = [
        "2 for each weight that is multiplied, and the scores and mix of every head for each token in sight. "
        "Training: forward and backward, half the context in sight on average"
        + (", with multi-token prediction." if facts["mtp"]["depth"] else ".")
    ]
    return f"Arithmetic of one token, context {facts['context']:,}", ("", ""), rows, notes


def _memory(facts: dict[str, Any]) -> Section:
    inference, training = facts["memory"]["inference"], facts["memory"]["training"]
    rows: list[Row] = [
        (
            f"inference, {label} weights",
            size(inference[dtype]["weights"]),
            size(inference[dtype]["cache"]),
            size(inference[dtype]["total"]),
        )
        for dtype, label in (("bf16", "bf16"), ("fp8", "FP8"))
    ]
    rows.append(("training", size(training["weights_bf16"]), "", size(training["total"])))
    notes = [
        "Cache: one sequence, bf16. FP8: attention, feed-forward and experts in e4m3 with a float32 scale for each "
        "128 x 128; all else bf16.",
        f"Training: {training['bytes_per_parameter']} bytes a parameter, namely weights in bf16 (2), gradients in "
        "float32 (4), a float32 copy of the weights (4), AdamW's two moments in float32 (8). No activations.",
    ]
    if facts["mtp"]["depth"]:
        notes.append("Inference without the multi-token modules, training with them.")
    return f"Memory, context {inference['context']:,}", ("", "weights", "cache", "in all"), rows, notes
