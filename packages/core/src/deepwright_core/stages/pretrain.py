"""The stage pretrain: next-token and MTP loss over packed text, from random weights or from those of a given model.

Reports validation bits per byte beside those of the tokenizer's unigram model on the same files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from pydantic import Field

from ..data.corpus import read_manifest
from ..data.packing import PackedBatches
from ..finetune.start import load_start
from ..model.cost import count
from ..model.directory import save_model
from ..model.fp8 import train_in_fp8
from ..model.precision import autocast, resolve
from ..model.transformer import Transformer, build_model
from ..registry import Registry
from ..stage import Stage, StageContext, StageResult
from ..tokenizer import Tokenizer
from ..training.machine import matrix_rate, pick_device
from ..training.objective import IGNORED, Loss, count_targets, language_model_loss, mean_loss, targets_at
from ..training.trainer import Metrics, Trainer, TrainingConfig, train

BITS = 1 / math.log(2)
START = "start_model"


class PretrainConfig(TrainingConfig):
    """batch_size rows of sequence_length tokens a step, `micro_batch` rows at a time (0: all at once).

    validation_batches: how many batches of held-out text each evaluation reads (0: all).
    """

    steps: int = Field(600, ge=1)
    lr: float = Field(3e-3, gt=0)
    batch_size: int = Field(16, ge=1)
    micro_batch: int = Field(0, ge=0)
    sequence_length: int = Field(256, ge=2)
    evaluate_every: int = Field(100, ge=0)
    validation_batches: int = Field(0, ge=0)


def register(registry: Registry) -> None:
    registry.add("stage", "pretrain", config=PretrainConfig)(build)


def build(config: PretrainConfig) -> Stage:
    """Packed text to a base model."""
    return Stage(
        "pretrain",
        ("seed", "precision", "kernels", "model", "optimizer", "schedule", "pretrain"),
        {"tokenizer": "prepare", "corpus": "prepare"},
        partial(run, config),
        partial(check, config),
        start=START,
    )


def check(config: PretrainConfig, sections: Mapping[str, Any]) -> list[str]:
    """What cannot be seen in one section alone."""
    problems: list[str] = sections["model"].too_long(config.sequence_length, "pretrain.sequence_length")
    if config.micro_batch and config.batch_size % config.micro_batch:
        problems.append(
            f"pretrain.batch_size is {config.batch_size}; "
            f"expected a multiple of pretrain.micro_batch, which is {config.micro_batch}."
        )
    return problems


def balance_note(balance: Mapping[str, float]) -> list[str]:
    """How even the experts' load became; nothing for a model without experts."""
    if not balance:
        return []
    return [
        f"The busiest expert was {balance['expert_max_violation_first']:.0%} above an even load at first and "
        f"{balance['expert_max_violation_last']:.0%} at the end; dead experts: {balance['dead_experts']:.0f}."
    ]


class BitsPerByte:
    """Validation loss in bits per byte of text: comparable between tokenizers, and with any compressor."""

    def __init__(self, corpus: Any, batch_size: int, sequence_length: int, batches: int) -> None:
        encoded = read_manifest(corpus)["encoded"]["validation"]
        self.bytes_per_token = encoded["text_bytes"] / encoded["text_predictions"]
        self.batches = PackedBatches(corpus, "validation", batch_size, sequence_length)
        self.count = min(batches or self.batches.steps_per_epoch, self.batches.steps_per_epoch)

    @torch.no_grad()
    def __call__(self, model: Transformer, dtype: torch.dtype) -> float:
        device = next(model.parameters()).device
        nats, tokens = 0.0, 0
        for step in range(self.count):
            tokens_BS1, segments_BS1 = (t.to(device) for t in self.batches.batch(step))
            targets_BS = targets_at(tokens_BS1, segments_BS1, None, 1)
            with autocast(device, dtype):
                hidden_BSD = model(tokens_BS1[:, :-1], segments_BS1[:, :-1])
                loss = mean_loss(model, hidden_BSD, targets_BS)
            here = int((targets_BS != IGNORED).sum())
            nats += float(loss) * here
            tokens += here
        return nats / tokens * BITS / self.bytes_per_token


def run(config: PretrainConfig, sections: Mapping[str, Any], context: StageContext) -> StageResult:
    """Train a base model."""
    device = pick_device()
    dtype = resolve(sections["precision"], device)
    tokenizer = Tokenizer.load(context.inputs["tokenizer"])
    corpus = context.inputs["corpus"]
    notes: tuple[str, ...] = ()
    if START in context.inputs:
        start = load_start(context.inputs[START], context.registry, device, tokenizer)
        model, notes = start.model, start.notes
    else:
        model_config = sections["model"].model_copy(update={"vocab_size": tokenizer.vocab_size})
        model = build_model(context.registry, model_config, seed=sections["seed"]).to(device)
    if sections["precision"] == "fp8":
        train_in_fp8(model)
    trainer = Trainer(
        model,
        context.registry.build("optimizer", sections["optimizer"], model, lr=config.lr),
        context.registry.build("schedule", sections["schedule"], config.steps),
        config.clip,
        dtype,
    )
    data = PackedBatches(corpus, "train", config.batch_size, config.sequence_length, sections["seed"])
    validation = BitsPerByte(corpus, config.batch_size, config.sequence_length, config.validation_batches)
    unigram = float(read_manifest(corpus)["unigram_bits_per_byte"])
    cost = count(model)
    tokens_per_step = config.batch_size * config.sequence_length
    flops_per_step = cost.training_flops(tokens_per_step, config.sequence_length)
    rate = matrix_rate(device, dtype)
    rows = config.micro_batch or config.batch_size
    parts = config.batch_size // rows
    memory: dict[str, Any] = {}

    def step(number: int) -> Metrics:
        tokens_BS1, segments_BS1 = (t.to(device) for t in data.batch(number))
        # A micro-batch counts by its targets: documents end where they end, so no two have equally many.
        counts = [count / parts for count in count_targets(model, tokens_BS1, segments_BS1)]
        figures: Metrics = {"loss": 0.0}

        def micro(part: int) -> Loss:
            here = slice(part * rows, (part + 1) * rows)
            loss = language_model_loss(model, tokens_BS1[here], segments_BS1[here], counts=counts)
            figures["loss"] += float(loss.next_token) / parts
            if loss.further is not None:
                figures["mtp_loss"] = figures.get("mtp_loss", 0.0) + float(loss.further) / parts
            return loss.scaled(1 / parts)

        return figures | trainer.update(number, [partial(micro, part) for part in range(parts)])

    def evaluate(number: int) -> Metrics:
        return {"validation_bits_per_byte": validation(model, dtype), "unigram_bits_per_byte": unigram}

    def rated(number: int) -> Metrics:
        began = time.perf_counter()
        figures = step(number)
        seconds = time.perf_counter() - began
        figures["tokens_per_second"] = tokens_per_step / seconds
        figures["mfu"] = flops_per_step / seconds / rate
        return figures

    train("pretrain", trainer, config, context, rated, memory, evaluate)
    save_model(model, context.directory / "model")
    tokenizer.save(context.directory / "model")
    evaluations = memory["evaluations"]
    first, last = evaluations[0]["validation_bits_per_byte"], evaluations[-1]["validation_bits_per_byte"]
    metrics = {
        "validation_bits_per_byte": last,
        "unigram_bits_per_byte": unigram,
        "parameters_total": float(cost.parameters_total),
        "parameters_active": float(cost.parameters_active),
        "cache_bytes_per_token": 4.0 * cost.cache_values,
        "cache_bytes_per_token_mha": 4.0 * cost.mha_cache_values,
        "cache_saving": 1 - cost.cache_values / cost.mha_cache_values,
        "tokens_per_second": tokens_per_step * config.steps / memory["seconds"],
        **memory["balance"],
    }
    return StageResult(
        {"base_model": "model"},
        metrics,
        ("validation bits per byte", first, last),
        tokens_per_step * config.steps,
        flops_per_step * config.steps,
        (
            f"Held-out text takes {last:.3f} bits per byte; the tokenizer's unigram model takes {unigram:.3f}.",
            f"The cache holds {cost.cache_values} values per token; plain multi-head attention with the same heads "
            f"would hold {cost.mha_cache_values} ({1 - cost.cache_values / cost.mha_cache_values:.0%} less).",
            *balance_note(memory["balance"]),
            *notes,
        ),
    )
