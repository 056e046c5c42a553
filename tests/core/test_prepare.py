"""The stage prepare: complete, repeatable, honest about what it mixed, and clean after an interruption."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deepwright_core import data, tasks, tokenizer
from deepwright_core.data.corpus import Corpus, read_manifest
from deepwright_core.errors import RequestError
from deepwright_core.registry import Registry
from deepwright_core.stage import Stage, StageContext, StageResult
from deepwright_core.stages import prepare
from deepwright_core.tasks import SPLITS, load_problems
from deepwright_core.tokenizer import Tokenizer
from deepwright_core.tokenizer.special import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER
from deepwright_core.tracking import JsonlTracker

TASK = {"name": "arithmetic", "train_size": 400, "validation_size": 20, "test_size": 20}


class Recorded:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int, int]] = []

    def start(self, description: str, total: int, completed: int = 0) -> None:
        self.phases.append((description, total, completed))

    def advance(self, completed: int, note: str = "") -> None:
        description, total, before = self.phases[-1]
        assert before <= completed <= total
        self.phases[-1] = (description, total, completed)


def registry_of_core() -> Registry:
    registry = Registry()
    for part in (data, tasks, tokenizer, prepare):
        part.register(registry)
    return registry


def source(directory: Path) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    for n in range(40):
        lines = [f"Line {k} of file {n} speaks of {'cats' if k % 3 else 'dogs'} and of 漢字.\n" for k in range(60)]
        (directory / f"{n:02}.txt").write_text("".join(lines), encoding="utf-8")
    (directory / "copy.txt").write_text((directory / "00.txt").read_text(encoding="utf-8"), encoding="utf-8")
    return {"name": "text", "path": str(directory), "validation_share": 0.2}


def run(directory: Path, texts: dict[str, Any], progress: Any = None, seed: int = 0, **config: Any) -> StageResult:
    registry = registry_of_core()
    sections = {
        "seed": seed,
        "data": registry.parse("source", texts),
        "tokenizer": registry.parse("tokenizer", {"name": "bpe", "vocab_size": 500}),
        "task": registry.parse("task", TASK),
        "prepare": prepare.PrepareConfig(**config),
    }
    stage: Stage = registry.get("stage", "prepare").build(sections["prepare"])
    assert set(sections) == set(stage.sections) and not stage.needs
    tracker = JsonlTracker(directory.parent / "metrics.jsonl")
    return stage.run(sections, StageContext(directory, tracker, progress or Recorded(), registry, None))


def digests(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageResult, Recorded, dict[str, Any]]:
    root = tmp_path_factory.mktemp("prepare")
    texts = source(root / "texts")
    progress = Recorded()
    return root / "out", run(root / "out", texts, progress), progress, texts


def documents(directory: Path, split: str) -> list[str]:
    vocabulary = Tokenizer.load(directory / "tokenizer")
    corpus = Corpus(directory / "corpus", split)
    return [vocabulary.decode(corpus[n].tolist(), skip_special=False) for n in range(len(corpus))]


def test_outputs_are_complete_and_nothing_else_is_left(prepared: Any) -> None:
    directory, result, progress, _ = prepared
    assert sorted(path.name for path in directory.iterdir()) == ["corpus", "problems", "tokenizer"]
    assert dict(result.outputs) == {"tokenizer": "tokenizer", "corpus": "corpus", "problems": "problems"}
    assert all(completed == total for _, total, completed in progress.phases)
    assert len(progress.phases) == 4
    for split, count in zip(SPLITS, (400, 20, 20), strict=True):
        assert len(load_problems(directory / "problems" / f"{split}.jsonl")) == count
        assert result.metrics[f"problems_{split}"] == count


@pytest.mark.costly
def test_the_same_request_gives_the_same_bytes_and_another_seed_does_not(prepared: Any, tmp_path: Path) -> None:
    directory, _, _, texts = prepared
    run(tmp_path / "again", texts)
    assert digests(tmp_path / "again") == digests(directory)
    run(tmp_path / "other", texts, seed=1)
    changed = {name for name, digest in digests(tmp_path / "other").items() if digests(directory)[name] != digest}
    assert "corpus/train.bin" in changed
    assert not any(name.startswith("problems/") for name in changed)


def test_an_interrupted_run_is_swept_away(prepared: Any, tmp_path: Path) -> None:
    directory, _, _, texts = prepared
    target = tmp_path / "out"
    (target / ".prepare-killed" / "corpus").mkdir(parents=True)
    (target / "corpus").mkdir()
    (target / "corpus" / "train.bin").write_bytes(b"half")
    run(target, texts)
    assert digests(target) == digests(directory)


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("only one document\n")
    with pytest.raises(RequestError, match="no document for"):
        run(tmp_path / "out", {"name": "text", "path": str(tmp_path / "texts")})
    assert list((tmp_path / "out").iterdir()) == []


def test_documents_are_the_texts_between_begin_and_end(prepared: Any) -> None:
    directory, _, _, texts = prepared
    written = {path.read_text(encoding="utf-8") for path in Path(texts["path"]).iterdir()}
    found = documents(directory, "train") + documents(directory, "validation")
    assert all(document.startswith(BOS) and document.endswith(EOS) for document in found)
    plain = [document.removeprefix(BOS).removesuffix(EOS) for document in found if USER not in document]
    assert set(plain) == written and len(plain) == len(written)


def test_validation_is_text_alone_and_held_out_problems_are_nowhere(prepared: Any) -> None:
    directory, _, _, _ = prepared
    assert not any(USER in document for document in documents(directory, "validation"))
    corpus = "\n".join(documents(directory, "train"))
    for split in ("validation", "test"):
        for problem in load_problems(directory / "problems" / f"{split}.jsonl"):
            assert problem.metadata["expression"] not in corpus


def test_the_mixture_is_what_was_asked_for_and_is_recorded(prepared: Any) -> None:
    directory, result, _, _ = prepared
    mixed = [document for document in documents(directory, "train") if USER in document]
    worked = [document for document in mixed if THINK_START in document]
    record = read_manifest(directory / "corpus")["mixture"]
    assert record["documents"] == len(mixed) and record["documents_worked"] == len(worked)
    assert 0.2 < len(worked) / len(mixed) < 0.4
    assert result.metrics["train_problem_share"] == pytest.approx(0.3, abs=0.01)
    by_question = {p.question: p for p in load_problems(directory / "problems" / "train.jsonl")}
    for document in mixed:
        question, reply = document.removeprefix(BOS + USER).removesuffix(EOS).split(ASSISTANT)
        problem = by_question[question]
        assert reply in (problem.answer, f"{THINK_START}{problem.worked}{THINK_END}{problem.answer}")


def test_text_alone_has_no_problems(prepared: Any, tmp_path: Path) -> None:
    _, _, _, texts = prepared
    result = run(tmp_path / "out", texts, problem_share=0.0)
    assert result.metrics["train_problem_share"] == 0.0
    assert not any(USER in document for document in documents(tmp_path / "out", "train"))


def test_the_manifest_counts_what_is_there(prepared: Any) -> None:
    directory, result, _, texts = prepared
    manifest = read_manifest(directory / "corpus")
    assert manifest["source"] == registry_of_core().parse("source", texts).model_dump(mode="json")
    assert manifest["dropped"]["duplicate"] == {"count": 1, "names": [str(Path(texts["path"]) / "copy.txt")]}
    assert len(manifest["files"]) == 40
    for split in ("train", "validation"):
        encoded = manifest["encoded"][split]
        corpus = Corpus(directory / "corpus", split)
        assert encoded["tokens"] == len(corpus.ids) == result.metrics[f"{split}_tokens"]
        assert encoded["documents"] == len(corpus)
        assert encoded["sha256"] == hashlib.sha256((directory / "corpus" / f"{split}.bin").read_bytes()).hexdigest()
        assert encoded["text_bytes"] == sum(f["bytes"] for f in manifest["files"] if f["split"] == split)


def test_the_unigram_figure_is_the_definition(prepared: Any) -> None:
    directory, result, _, _ = prepared
    vocabulary = Tokenizer.load(directory / "tokenizer")
    train, validation = (Corpus(directory / "corpus", split) for split in ("train", "validation"))
    counts: Counter[int] = Counter()
    for n in range(len(train)):
        ids = train[n].tolist()
        if vocabulary.user_id not in ids:
            counts.update(ids[1:])
    total = sum(counts.values()) + vocabulary.vocab_size
    predicted = [i for n in range(len(validation)) for i in validation[n].tolist()[1:]]
    bits = sum(-math.log2((counts[i] + 1) / total) for i in predicted)
    size = sum(len(text.removeprefix(BOS).removesuffix(EOS).encode()) for text in documents(directory, "validation"))
    assert result.metrics["validation_unigram_bits_per_byte"] == pytest.approx(bits / size)
    assert result.metrics["validation_bytes_per_token"] == pytest.approx(size / len(predicted))


def test_metrics_are_plain_finite_numbers(prepared: Any) -> None:
    directory, result, _, _ = prepared
    assert all(isinstance(value, float) and math.isfinite(value) for value in result.metrics.values())
    lines = (directory.parent / "metrics.jsonl").read_text().splitlines()
    assert any("validation_unigram_bits_per_byte" in json.loads(line) for line in lines)
