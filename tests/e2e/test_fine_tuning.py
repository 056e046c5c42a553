"""Fine-tuning what exists: every stage from a given model directory, with all weights or with adapters."""

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core.engine import Engine
from deepwright_core.errors import RequestError, WorkError
from deepwright_core.evaluation import EvaluationConfig, assess
from deepwright_core.finetune.apply_adapter import apply_adapter
from deepwright_core.hookspecs import hookimpl
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import load_model, read_config, save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.plugins import Plugins, installed
from deepwright_core.registry import parse
from deepwright_core.tasks import load_problems
from deepwright_core.tasks.verifier import Verifier
from deepwright_core.tokenizer import Tokenizer
from deepwright_core.tracking import SilentProgress
from flows import request, session

FIXED = ("experiment=smoke", "run.workflow=none", "tracking=jsonl", "threads=1")
# Small examinations: what is asked here is whether the right model is examined.
SHORT = ("sft.steps=6", "sft.evaluation.problems=8", "rl.evaluation.problems=8", "rl.steps=4")


class Quiet(SilentProgress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, name: str) -> None:
        return

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        return


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return installed()


def run(plugins: Plugins, root: Path, target: str, *overrides: str) -> session.Report:
    asked = request.make(target, [*FIXED, f"paths.root={root}", *overrides], plugins)
    return session.run(asked, plugins, Quiet())


@pytest.fixture(scope="module")
def models(plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which a base model and one that answers in chat form were trained, and copies of both."""
    root = tmp_path_factory.mktemp("trained")
    for outcome in run(plugins, root / "runs", "sft").outcomes:
        if outcome.stage in ("pretrain", "sft"):
            shutil.copytree(outcome.directory / "model", root / outcome.stage)
    return root


Go = Callable[..., dict[str, session.Outcome]]


@pytest.fixture
def go(plugins: Plugins, models: Path, tmp_path: Path) -> Go:
    """Run a target in a root of the test's own, in which the texts are prepared already; outcomes by stage."""

    def call(target: str, *overrides: str, root: str = "runs") -> dict[str, session.Outcome]:
        if not (tmp_path / root).exists():
            (prepared,) = (models / "runs" / "stages").glob("prepare-*")
            shutil.copytree(prepared, tmp_path / root / "stages" / prepared.name)
        report = run(plugins, tmp_path / root, target, *SHORT, *overrides)
        return {outcome.stage: outcome for outcome in report.outcomes}

    return call


@pytest.fixture(autouse=True)
def untouched(models: Path) -> Iterator[None]:
    """Nobody writes into a directory that was given."""

    def contents() -> dict[Path, bytes]:
        given = [models / "pretrain", models / "sft"]
        return {path: path.read_bytes() for folder in given for path in folder.rglob("*")}

    before = contents()
    yield
    assert contents() == before


def weights(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def logged(outcome: Any, name: str) -> list[float]:
    lines = (outcome.directory / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def examined(plugins: Plugins, model: Path, problems: Path, evaluation: EvaluationConfig) -> dict[str, float]:
    """Figures of a model directory, without any stage."""
    tokenizer, asked = Tokenizer.load(model), load_problems(problems / "test.jsonl")
    engine = Engine(load_model(model, plugins.registry), tokenizer.eos_id)
    with Verifier() as verifier:
        return assess(engine, tokenizer, asked, verifier.score, evaluation, seed=0).metrics


EXAMINATION = EvaluationConfig(problems=8, validation_problems=8, samples=2, max_tokens=16)


# Every weight ---------------------------------------------------------------------------------------


def test_a_copy_of_a_stages_model_stands_for_the_stage(plugins: Plugins, models: Path) -> None:
    """Found by its content: the very result that came of the original is reused, and pretrain is not even looked at."""
    report = run(plugins, models / "runs", "sft", f"model.init={models / 'pretrain'}")
    assert [(o.stage, o.reused) for o in report.outcomes] == [("prepare", True), ("sft", True)]


def test_supervised_fine_tuning_starts_from_the_given_weights(go: Go, plugins: Plugins, models: Path) -> None:
    done = go("sft", f"model.init={models / 'sft'}")
    assert list(done) == ["prepare", "sft"] and done["prepare"].reused
    problems = done["prepare"].directory / "problems"
    want = examined(plugins, models / "sft", problems, EXAMINATION)
    assert logged(done["sft"], "test_pass_at_1")[0] == want["pass_at_1"] > 0
    made = done["sft"].directory / "model"
    assert weights(made) != weights(models / "sft") and read_config(made, plugins.registry) == read_config(
        models / "sft", plugins.registry
    )


def test_other_weights_are_another_stage_and_the_same_are_not(go: Go, models: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(models / "sft", moved)
    first = go("sft", f"model.init={models / 'sft'}")["sft"]
    again = go("sft", f"model.init={moved}")["sft"]
    assert again.reused and again.identity == first.identity
    data = bytearray((moved / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (moved / "model.safetensors").write_bytes(data)
    other = go("sft", f"model.init={moved}")["sft"]
    assert not other.reused and other.identity != first.identity


def test_pretraining_goes_on(go: Go, plugins: Plugins, models: Path) -> None:
    made = next(path for path in (models / "runs" / "stages").glob("pretrain-*"))
    ended = json.loads((made / "result.json").read_text())["metrics"]["validation_bits_per_byte"]
    done = go("pretrain", f"model.init={models / 'pretrain'}")
    _, before, after = done["pretrain"].result.headline
    assert before == ended and after < before
    own = ("tokenizer=file", f"tokenizer.path={models / 'pretrain'}")
    assert go("pretrain", f"model.init={models / 'pretrain'}", *own)["pretrain"].result.headline[1] == before


def test_a_corpus_in_other_ids_is_refused(go: Go, models: Path) -> None:
    with pytest.raises(RequestError, match=r"another tokenizer .* tokenizer=file tokenizer.path="):
        go("pretrain", f"model.init={models / 'pretrain'}", "tokenizer.vocab_size=300")


def test_a_pipeline_leaves_pretraining_out(go: Go, models: Path) -> None:
    done = go("pipeline", f"model.init={models / 'pretrain'}", "run.stages=[prepare,pretrain,sft,rl]")
    assert list(done) == ["prepare", "sft", "rl"]
    assert done["rl"].inputs["sft_model"] == done["sft"].directory / "model"


@pytest.mark.slow
def test_a_stage_in_a_process_of_its_own_gets_the_model_too(go: Go, models: Path) -> None:
    here = go("sft", f"model.init={models / 'sft'}")["sft"]
    there = go("sft", f"model.init={models / 'sft'}", "run.isolate=true", root="isolated")["sft"]
    assert weights(there.directory / "model") == weights(here.directory / "model")


# Distillation ---------------------------------------------------------------------------------------


def test_a_student_and_its_control_start_from_given_weights(go: Go, plugins: Plugins, models: Path) -> None:
    """With a rate of nothing they stay what they were."""
    given = [f"model.init={models / 'sft'}", f"distill.student.init={models / 'sft'}"]
    distill = go("distill", *given, "distill.lr=1e-30", "distill.samples=4")["distill"]
    metrics = distill.result.metrics
    assert metrics["teacher_test_pass_at_1"] > 0
    for figure in ("pass_at_1", "greedy_accuracy", "response_tokens"):
        values = {metrics[f"{role}_test_{figure}"] for role in ("teacher", "student", "control")}
        assert len(values) == 1, figure
    given_model, made = (load_model(path, plugins.registry) for path in (models / "sft", distill.directory / "model"))
    for (name, ours), theirs in zip(made.named_parameters(), given_model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_a_student_with_another_tokenizer_learns_the_same_words(
    go: Go, plugins: Plugins, models: Path, tmp_path: Path
) -> None:
    registry = plugins.registry
    tokenizer = registry.build("tokenizer", {"name": "bpe", "vocab_size": 300}, ["find the greatest divisor of 12"] * 9)
    values = {**read_config(models / "pretrain", registry).model_dump(), "vocab_size": tokenizer.vocab_size}
    save_model(build_model(registry, parse(ModelConfig, values, "model", registry), seed=3), tmp_path / "student")
    tokenizer.save(tmp_path / "student")
    given = [f"model.init={models / 'sft'}", f"distill.student.init={tmp_path / 'student'}"]
    # The student's tokens are shorter, so its rows must be longer.
    distill = go("distill", *given, "distill.samples=4", "distill.sequence_length=256")["distill"]
    (record, *_) = [json.loads(line) for line in (distill.directory / "verified.jsonl").read_text().splitlines()]
    teacher = Tokenizer.load(models / "sft")
    assert record["question"] in teacher.decode(record["prompt"]) and record["answer"]
    made = Tokenizer.load(distill.directory / "model")
    assert made.extends(tokenizer) and not made.extends(teacher)
    losses = logged(distill, "student_loss")
    assert losses[-1] < losses[0]


# Adapters -------------------------------------------------------------------------------------------


def test_reinforcement_with_adapters(go: Go, plugins: Plugins, models: Path, tmp_path: Path) -> None:
    given = models / "sft"
    full = go("rl", f"model.init={given}", "rl.minibatches=1")["rl"]
    lora = go("rl", f"model.init={given}", "rl.minibatches=1", "finetune=lora", "rl.lr=1e-2")["rl"]
    # The first rollouts and the first examination are those of the given model, with and without adapters.
    assert logged(lora, "test_pass_at_1")[0] == logged(full, "test_pass_at_1")[0] > 0
    assert logged(lora, "reward")[0] == logged(full, "reward")[0]
    # At every step what sampled is what learns, and it moves away from the given model.
    assert max(logged(lora, "sampler_gap")) < 1e-4 and set(logged(lora, "largest_ratio")) == {1.0}
    assert logged(lora, "kl")[0] == 0.0 < logged(lora, "kl")[-1]

    before, after = (load_model(path, plugins.registry).state_dict() for path in (given, lora.directory / "model"))
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed and all(".attention." in name or ".ffn.experts." in name for name in changed)
    assert any(".ffn.experts." in name for name in changed)

    apply_adapter(given, lora.directory / "adapter", tmp_path / "again", plugins.registry)
    assert weights(tmp_path / "again") == weights(lora.directory / "model")
    assert {"rl_model", "adapter", "samples"} == lora.result.outputs.keys()
    share = lora.result.metrics["parameters_trained_share"]
    assert 0 < share < 1 and any(f"{share:.1%}" in note for note in lora.result.notes)


def test_supervised_fine_tuning_with_adapters(go: Go, plugins: Plugins, models: Path, tmp_path: Path) -> None:
    given = models / "pretrain"
    full = go("sft", f"model.init={given}")["sft"]
    lora = go("sft", f"model.init={given}", "finetune=lora", "finetune.targets=[attention,ffn.experts,ffn.shared]")[
        "sft"
    ]
    assert logged(lora, "loss")[0] == logged(full, "loss")[0]
    assert logged(lora, "loss")[-1] < logged(lora, "loss")[0]
    apply_adapter(given, lora.directory / "adapter", tmp_path / "again", plugins.registry)
    assert weights(tmp_path / "again") == weights(lora.directory / "model")
    # And what was made is a start like any other.
    assert list(go("rl", f"model.init={lora.directory}", "rl.steps=1")) == ["prepare", "rl"]


def test_adapters_that_were_cut_off_end_like_those_that_were_not(go: Go, plugins: Plugins, models: Path) -> None:
    asked = ("rl", f"model.init={models / 'sft'}", "finetune=lora", "rl.lr=1e-2")
    whole = go(*asked)["rl"]
    small = (whole.directory / "checkpoints" / "step-00000004" / "model.safetensors").stat().st_size
    assert small < (whole.directory / "model" / "model.safetensors").stat().st_size / 2

    class Plug:
        done = False

        @hookimpl
        def deepwright_checkpoint_saved(self, event: Any) -> None:
            if not self.done:
                self.done = True
                raise OSError("pulled")

    plug = Plug()
    plugins.manager.register(plug)
    try:
        with pytest.raises(WorkError, match="pulled"):
            go(*asked, root="other")
        cut = go(*asked, root="other")["rl"]
    finally:
        plugins.manager.unregister(plug)
    assert plug.done and cut.identity == whole.identity
    for name in ("model/model.safetensors", "adapter/adapter.safetensors"):
        assert (cut.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name


# The record -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_tracker_knows_where_a_model_came_from(go: Go, models: Path, tmp_path: Path) -> None:
    done = go("pipeline", f"model.init={models / 'sft'}", "run.stages=[rl]", "rl.steps=1", "tracking=mlflow")["rl"]
    digest = json.loads((done.directory / "made_from.json").read_text())["inputs"]["sft_model"]
    with sqlite3.connect(tmp_path / "runs" / "mlflow" / "mlflow.db") as database:
        parameters = dict(database.execute("select key, value from params where key like 'given.%'").fetchall())
        tags = dict(database.execute("select key, value from model_version_tags").fetchall())
    assert parameters == {"given.sft_model.directory": str(models / "sft"), "given.sft_model.sha256": digest}
    assert tags["given.sft_model"] == f"{models / 'sft'} sha256:{digest}"
