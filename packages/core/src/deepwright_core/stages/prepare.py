"""The stage prepare: text and problems to ids on the disk.

    source → documents → tokenizer (learns from the training split) → corpus/
    task   → problems/, and some of its training problems into the training text

Everything is built in a temporary folder beside the outputs and moved when it is complete; a stage that was cut off
starts over, which takes seconds for text of a few megabytes.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ..data.corpus import MANIFEST_FILE, CorpusWriter, dtype_for
from ..data.document import TEXT_SPLITS, TextSplit
from ..data.manifest import Manifest, collect, texts
from ..data.mixture import Mixture
from ..data.unigram import Unigram
from ..errors import RequestError
from ..registry import Registry
from ..stage import Stage, StageContext, StageResult, write_atomically
from ..tasks import SPLITS, dump_problems
from ..tokenizer import Tokenizer

OUTPUTS = {"tokenizer": "tokenizer", "corpus": "corpus", "problems": "problems"}
# Encoded together: enough for all threads, little enough to hold in memory.
BATCH_DOCUMENTS = 64


class PrepareConfig(BaseModel):
    """How the training text is mixed.

    problem_share: part of the training tokens that are problems of the task; 0 for text alone.
    worked_share: part of those problems that show their work in <think>; the rest have a bare answer.
    tokenizer_problems: how many problem documents the tokenizer learns from beside the text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    problem_share: float = Field(0.3, ge=0, lt=1)
    worked_share: float = Field(0.3, ge=0, le=1)
    tokenizer_problems: int = Field(4000, ge=0)


def register(registry: Registry) -> None:
    """Add the stage `prepare`."""
    registry.add("stage", "prepare", config=PrepareConfig)(build)


def build(config: PrepareConfig) -> Stage:
    """Text to a tokenizer, an encoded corpus and split problems."""
    return Stage("prepare", ("seed", "data", "tokenizer", "task", "prepare"), {}, partial(_run, config))


def _run(config: PrepareConfig, sections: Mapping[str, Any], context: StageContext) -> StageResult:
    context.directory.mkdir(parents=True, exist_ok=True)
    for left_over in context.directory.glob(".prepare-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".prepare-", dir=context.directory))
    try:
        metrics = _prepare(config, sections, context, work)
        for name in OUTPUTS.values():
            target = context.directory / name
            if target.exists():
                shutil.rmtree(target)
            os.replace(work / name, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return StageResult(
        outputs=OUTPUTS,
        metrics=metrics,
        headline=("unigram bits per byte", None, metrics["validation_unigram_bits_per_byte"]),
        tokens=int(metrics["train_tokens"] + metrics["validation_tokens"]),
    )


def _prepare(config: PrepareConfig, sections: Mapping[str, Any], context: StageContext, work: Path) -> dict[str, float]:
    registry, progress = context.registry, context.progress
    problems = registry.build("task", sections["task"]).generate(progress)
    for split in SPLITS:
        write_atomically(work / "problems" / f"{split}.jsonl", dump_problems(problems[split]))

    manifest = collect(registry.build("source", sections["data"]), work / "text", progress)
    _require_text(manifest)

    mixture = Mixture(problems["train"], config.problem_share, config.worked_share, int(sections["seed"]))
    progress.start("training the tokenizer", 1)
    learnt_from = itertools.chain(texts(work / "text", "train"), mixture.sample(config.tokenizer_problems))
    tokenizer: Tokenizer = registry.build("tokenizer", sections["tokenizer"], learnt_from)
    tokenizer.save(work / "tokenizer")
    progress.advance(1, f"{tokenizer.vocab_size} tokens")

    facts, metrics = _encode(tokenizer, manifest, mixture, work, context)
    metrics |= {f"problems_{split}": float(len(problems[split])) for split in SPLITS}
    record = {
        "format": 1,
        "source": _plain(sections["data"]),
        "task": _plain(sections["task"]),
        "python": sys.version.split()[0],
        "vocab_size": tokenizer.vocab_size,
        **facts,
        "mixture": mixture.as_json(),
        "problems": {split: len(problems[split]) for split in SPLITS},
        **manifest.as_json(),
    }
    write_atomically(work / "corpus" / MANIFEST_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    context.tracker.parameters({"data": record["source"], "vocab_size": tokenizer.vocab_size})
    context.tracker.metrics(metrics, step=0)
    return metrics


def _encode(
    tokenizer: Tokenizer, manifest: Manifest, mixture: Mixture, work: Path, context: StageContext
) -> tuple[dict[str, Any], dict[str, float]]:
    """Write both splits of the corpus; the facts for its manifest, and the metrics."""
    progress = context.progress
    dtype = dtype_for(tokenizer.vocab_size)
    unigram = Unigram(tokenizer.vocab_size)
    progress.start("encoding", manifest.documents("train") + manifest.documents("validation"))
    facts: dict[str, Any] = {"dtype": dtype.name, "encoded": {}}
    metrics: dict[str, float] = {}

    with CorpusWriter(work / "corpus", "train", dtype) as train:
        for ids in _documents(tokenizer, work, "train"):
            unigram.count(ids)
            train.append(ids)
            if train.documents % BATCH_DOCUMENTS == 0:
                progress.advance(train.documents, f"{train.tokens:,} tokens")
        text_tokens = train.tokens
        for ids in mixture.documents(tokenizer, text_tokens):
            train.append(ids)
    bits = 0.0
    with CorpusWriter(work / "corpus", "validation", dtype) as validation:
        for ids in _documents(tokenizer, work, "validation"):
            bits += unigram.bits(ids)
            validation.append(ids)
    progress.advance(manifest.documents("train") + validation.documents, f"{train.tokens + validation.tokens:,} tokens")

    for split, writer, tokens in zip(TEXT_SPLITS, (train, validation), (text_tokens, validation.tokens), strict=True):
        size, documents = manifest.bytes(split), manifest.documents(split)
        facts["encoded"][split] = {
            "documents": writer.documents,
            "tokens": writer.tokens,
            "text_tokens": tokens,
            # A document's begin token is given, every other one is predicted; bits per byte count those.
            "text_predictions": tokens - documents,
            "text_bytes": size,
            "sha256": writer.sha256,
        }
        metrics |= {
            f"{split}_documents": float(writer.documents),
            f"{split}_bytes": float(size),
            f"{split}_tokens": float(writer.tokens),
            f"{split}_bytes_per_token": size / (tokens - documents),
        }
    metrics["validation_unigram_bits_per_byte"] = bits / manifest.bytes("validation")
    metrics["train_problem_share"] = mixture.tokens / train.tokens
    facts["unigram_bits_per_byte"] = metrics["validation_unigram_bits_per_byte"]
    return facts, metrics


def _documents(tokenizer: Tokenizer, work: Path, split: TextSplit) -> Iterator[list[int]]:
    """The encoded documents of a split, begin and end tokens included."""
    begin, end = tokenizer.mark_id("bos"), tokenizer.mark_id("eos")
    waiting = texts(work / "text", split)
    while batch := list(itertools.islice(waiting, BATCH_DOCUMENTS)):
        for ids in tokenizer.encode_batch(batch):
            yield [begin, *ids, end]


def _require_text(manifest: Manifest) -> None:
    counts = {split: manifest.documents(split) for split in TEXT_SPLITS}
    for split, count in counts.items():
        if count == 0:
            dropped = ", ".join(f"{n} {reason}" for reason, n in manifest.dropped_counts.items()) or "none"
            raise RequestError(
                f"data: no document for {split} (found: {counts}; dropped: {dropped}); "
                "give more text, another data.validation_share, or a data.validation_path."
            )


def _plain(section: Any) -> dict[str, Any]:
    return section.model_dump(mode="json") if isinstance(section, BaseModel) else dict(section)
