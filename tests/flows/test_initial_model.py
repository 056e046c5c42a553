"""`model.init`: which stages it stands in for, what the configuration then says, what is refused, what is digested."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.plugins import Plugins, installed
from deepwright_core.registry import parse
from deepwright_core.stage import Stage
from flows import compose, fingerprint, form_fields, given_digests, mlflow_tracker, plan, request

VALUES: dict[str, Any] = {
    "hidden_size": 8,
    "layers": 2,
    "intermediate_size": 12,
    "max_positions": 300,
    "attention": {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 4},
    "ffn": {"name": "dense"},
}


@pytest.fixture(autouse=True)
def real_conf(toy_conf: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository's configuration, not the toy's."""
    monkeypatch.delenv("DEEPWRIGHT_CONF")


@pytest.fixture(scope="session")
def all_plugins() -> Plugins:
    return installed()


@pytest.fixture(scope="session")
def base(all_plugins: Plugins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    directory = tmp_path_factory.mktemp("models") / "base"
    registry = all_plugins.registry
    tokenizer = registry.build("tokenizer", {"name": "bpe", "vocab_size": 280}, ["one text is enough"])
    values = {**VALUES, "vocab_size": tokenizer.vocab_size}
    save_model(build_model(registry, parse(ModelConfig, values, "model", registry), seed=0), directory)
    tokenizer.save(directory)
    return directory


Make = Callable[..., request.Request]


@pytest.fixture
def make(all_plugins: Plugins) -> Make:
    def made(target: str, *overrides: str, **options: Any) -> request.Request:
        return request.make(target, overrides, all_plugins, **options)

    return made


def refused(make: Make, *overrides: str, target: str = "sft", **options: Any) -> list[str]:
    with pytest.raises(RequestError) as error:
        make(target, *overrides, **options)
    return error.value.problems


# Which stages ---------------------------------------------------------------------------------------


def shape(asked: request.Request) -> dict[str, list[str]]:
    """Stage -> the artifacts that it is given from outside."""
    return {stage.name: sorted(stage.given) for stage in asked.stages}


@pytest.mark.parametrize(
    ("target", "stages"),
    [
        ("sft", {"prepare": [], "sft": ["base_model"]}),
        ("rl", {"prepare": [], "rl": ["sft_model"]}),
        ("distill", {"prepare": [], "distill": ["rl_model"]}),
        ("serve", {"prepare": [], "serve": ["rl_model"]}),
        ("pretrain", {"prepare": [], "pretrain": ["start_model"]}),
        ("prepare", {"prepare": []}),
        ("pipeline", {"prepare": [], "sft": ["base_model"], "rl": [], "distill": [], "serve": []}),
    ],
)
def test_whom_the_model_is_given_to(make: Make, base: Path, target: str, stages: dict[str, list[str]]) -> None:
    asked = make(target, f"model.init={base}")
    assert shape(asked) == stages
    assert all(path == base for stage in asked.stages for path in stage.given.values())


@pytest.mark.parametrize(
    ("wanted", "stages"),
    [
        ("rl,distill", {"prepare": [], "rl": ["sft_model"], "distill": []}),
        ("prepare,pretrain", {"prepare": [], "pretrain": ["start_model"]}),
        ("distill,sft", {"prepare": [], "distill": ["rl_model"], "sft": ["base_model"]}),
    ],
)
def test_a_pipeline_of_some_stages(make: Make, base: Path, wanted: str, stages: dict[str, list[str]]) -> None:
    assert shape(make("pipeline", f"model.init={base}", f"run.stages=[{wanted}]")) == stages


def test_a_strangers_stage_that_asks_for_a_trained_model_gets_one(base: Path) -> None:
    """It names no start of its own: what it needs is trained from the given model."""

    def stage(name: str, start: str = "", **needs: str) -> Stage:
        return Stage(name, (), needs, lambda sections, context: None, start=start)  # type: ignore[arg-type,return-value]

    stages = {
        s.name: s
        for s in (stage("first", "none"), stage("second", "a", a="first", p="other"), stage("third", b="second"))
    } | {"other": stage("other")}
    changed, wanted = plan.with_given_model(stages, ["third"], base)
    ordered = plan.order(changed, wanted)
    assert [(s.name, dict(s.given)) for s in ordered] == [("other", {}), ("second", {"a": base}), ("third", {})]


def test_a_student_starts_from_a_directory_of_its_own(make: Make, base: Path) -> None:
    assert shape(make("distill", f"distill.student.init={base}"))["distill"] == ["student_start"]
    both = make("distill", f"model.init={base}", f"distill.student.init={base}")
    assert shape(both)["distill"] == ["rl_model", "student_start"]


# What the configuration says ------------------------------------------------------------------------


def test_the_section_says_what_the_directory_says(make: Make, base: Path, all_plugins: Plugins) -> None:
    asked = make("sft", "experiment=smoke", f"model.init={base}", f"distill.student.init={base}")
    said = json.loads((base / "config.json").read_text())
    assert said.pop("model_type") == "deepwright" and "init" not in said
    for section in (asked.composed["model"], asked.composed["distill"]["student"]):
        assert section == {"init": str(base), **said}
    assert asked.sections["model"].hidden_size == asked.sections["distill"].student.hidden_size == 8
    # Where the model came from is no part of what it is.
    assert "init" not in fingerprint.plain(asked.sections["model"])
    assert "init" not in fingerprint.plain(asked.sections["distill"])["student"]


def test_rows_must_fit_the_model_that_is_given(make: Make, base: Path) -> None:
    (problem,) = refused(make, f"model.init={base}", "sft.sequence_length=301")
    assert problem == "sft.sequence_length is 301; expected at most model.max_positions, which is 300."


def test_targets_of_lora_must_be_in_the_model_that_is_given(make: Make, base: Path) -> None:
    make("sft", f"model.init={base}", "finetune=lora", "finetune.targets=[attention,ffn.down]")
    (problem,) = refused(make, f"model.init={base}", "finetune=lora")
    assert "'ffn.experts', and no matrix of the model" in problem and "ffn.down" in problem


def test_a_saved_configuration_runs_again(make: Make, base: Path, tmp_path: Path) -> None:
    first = make("rl", f"model.init={base}")
    path = tmp_path / "config.yaml"
    path.write_text(compose.to_yaml(dict(first.composed)))
    again = make("rl", config_file=str(path))
    assert again.composed == first.composed and shape(again) == shape(first)


def test_a_saved_configuration_of_another_model_is_refused(make: Make, base: Path, tmp_path: Path) -> None:
    composed = dict(make("rl", f"model.init={base}").composed)
    path = tmp_path / "config.yaml"
    path.write_text(compose.to_yaml({**composed, "model": {**composed["model"], "norm_eps": 1e-5}}))
    (problem,) = refused(make, config_file=str(path))
    assert problem.startswith("model.norm_eps is 1e-05 in the saved configuration and 1e-06 in ")


def test_a_stages_directory_means_the_model_in_it(make: Make, base: Path, tmp_path: Path) -> None:
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "model").symlink_to(base)
    assert make("sft", f"model.init={tmp_path / 'stage'}").composed["model"]["init"] == str(
        tmp_path / "stage" / "model"
    )


def test_a_relative_path_is_kept_absolute(make: Make, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration that is saved must mean the same from anywhere."""
    monkeypatch.chdir(base.parent)
    assert make("sft", "model.init=base").composed["model"]["init"] == str(base)


@pytest.mark.parametrize("name", ["a b", "it's", "x=1,2", "(y)"])
def test_the_form_takes_any_path(make: Make, base: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(base)
    (override,) = form_fields.overrides_for(init=str(tmp_path / name))
    assert make("sft", override).composed["model"]["init"] == str(tmp_path / name)


# What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "model.hidden_size=16",
        "model.attention.heads=4",
        "model=tiny",
        "model/attention=mla",
        "+model.rope.yarn={factor:4}",
        "model.norm_eps=1e-5",
    ],
)
def test_an_override_that_would_change_the_model_is_refused(make: Make, base: Path, override: str) -> None:
    (problem,) = refused(make, override, f"model.init={base}")
    assert problem.startswith(f"Override '{override}' changes model") and "which model.init decides" in problem


@pytest.mark.parametrize(
    "override",
    ["model@distill.student=tiny", "model/attention@distill.student.attention=mla", "distill.student.layers=1"],
)
def test_an_override_that_would_change_the_student_is_refused(make: Make, base: Path, override: str) -> None:
    (problem,) = refused(make, override, f"distill.student.init={base}")
    assert problem.startswith(f"Override '{override}' changes distill.student")
    make("distill", override, f"model.init={base}")  # which says nothing of the student


def test_an_override_that_says_what_the_model_says_is_no_contradiction(make: Make, base: Path) -> None:
    make("sft", f"model.init={base}", "model.hidden_size=8", "model.ffn.intermediate_size=0")


def test_every_problem_is_told_at_once(make: Make, base: Path, tmp_path: Path) -> None:
    overrides = [f"model.init={tmp_path / 'nothing'}", f"distill.student.init={tmp_path}", "sft.steps=0"]
    problems = refused(make, *overrides)
    for sign in ("model.init: ", "distill.student.init: ", "sft.steps is 0"):
        assert any(problem.startswith(sign) for problem in problems), problems


@pytest.mark.parametrize("value", ["3", "[a,b]"])
def test_what_is_no_path_is_refused(make: Make, value: str) -> None:
    assert refused(make, f"model.init={value}")[0].startswith("model.init is ")


def test_a_model_in_somebody_elses_format_is_to_be_imported(make: Make, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    (problem,) = refused(make, f"model.init={tmp_path}")
    assert problem.startswith("model.init: ") and f"deepwright convert import {tmp_path}" in problem


# Digests --------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read to be digested."""
    read: list[str] = []
    real = given_digests.file_digest

    def digest(path: Path) -> str:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(given_digests, "file_digest", digest)
    return read


def copied(base: Path, to: Path) -> Path:
    to.mkdir()
    for file in base.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_a_digest_is_that_of_a_stages_output(base: Path, tmp_path: Path) -> None:
    assert given_digests.digest_of(base, tmp_path) == fingerprint.digest_of(fingerprint.record(base))


def test_files_are_read_once_and_again_when_they_changed(base: Path, tmp_path: Path, counted: list[str]) -> None:
    directory, names = copied(base, tmp_path / "model"), sorted(file.name for file in base.iterdir())
    first = given_digests.digest_of(directory, tmp_path)
    assert counted == names
    assert given_digests.digest_of(directory, tmp_path) == first and counted == names
    weights = directory / "model.safetensors"
    os.utime(weights, (1, 1))
    assert given_digests.digest_of(directory, tmp_path) == first  # touched, not changed
    assert counted == [*names, "model.safetensors"]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert given_digests.digest_of(directory, tmp_path) != first


def test_what_cannot_be_remembered_is_read_again(base: Path, tmp_path: Path, counted: list[str]) -> None:
    first = given_digests.digest_of(base, tmp_path)
    for broken in ("{", "[]", '{"a": 1}'):
        (tmp_path / given_digests.FILE).write_text(broken)
        counted.clear()
        assert given_digests.digest_of(base, tmp_path) == first and counted


def names_of(stages: Sequence[Stage]) -> list[str]:
    return [stage.name for stage in stages]


def test_without_a_given_model_everything_is_as_it_was(make: Make) -> None:
    asked = make("pipeline")
    assert names_of(asked.stages) == ["prepare", "pretrain", "sft", "rl", "distill", "serve"]
    assert not any(stage.given for stage in asked.stages)
    assert asked.composed["model"]["init"] == "" and asked.composed["finetune"] == {"name": "full"}


def test_a_registered_name_leads_to_its_directory(make: Make, base: Path, database: bytes, tmp_path: Path) -> None:
    root = tmp_path / "elsewhere"
    (root / "mlflow").mkdir(parents=True)
    (root / "mlflow" / "mlflow.db").write_bytes(database)
    client = mlflow_tracker.client_at(root, "")
    run = client.create_run("0", tags={"deepwright.directory": str(base), "deepwright.stage": "rl"})
    client.create_registered_model("ours")
    client.create_model_version("ours", str(base), run.info.run_id)
    client.set_registered_model_alias("ours", "candidate", "1")
    for name in ("ours@candidate", "models:/ours/1", run.info.run_id):
        asked = make("serve", f"model.init={name}", f"paths.root={root}")
        assert asked.sections["model"].init == str(base) and asked.composed["model"]["init"] == str(base)
    with pytest.raises(RequestError, match=r"model\.init: 'ours@nobody' is not known to the tracker"):
        make("serve", "model.init=ours@nobody", f"paths.root={root}")
