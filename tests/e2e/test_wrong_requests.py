"""Wrong requests: one clear sentence a problem on stderr, exit status 2, and nothing begun."""

import socket
from pathlib import Path

import pytest

from deepwright_core import plugins
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.registry import parse
from flows import cli

from .conftest import Run

FAST = ("run.workflow=none", "tracking=jsonl", "experiment=smoke")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["pretrain.stepz=3"], ["pretrain.stepz", "steps"]),
        (["pretrain.steps=many"], ["pretrain.steps", "many"]),
        (["model/attention=mlaa"], ["mlaa", "mla"]),
        (["model.ffn.experts=6", "model.ffn.router.groups=4"], ["model.ffn", "6", "4"]),
        (
            ["pretrain.sequence_length=4096", "sft.sequence_length=2048", "distill.sequence_length=1024"],
            ["pretrain.sequence_length is 4096", "sft.sequence_length is 2048", "distill.student.max_positions"],
        ),
        (["seed=-1", "rl.lr=0", "+sft.x=1"], ["seed", "rl.lr", "sft.x"]),
        (["model.init=nothing", "distill.student.init=nothing"], ["model.init: ", "distill.student.init: ", "nothing"]),
        (["finetune=lora", "finetune.targets=[attention,expert]"], ["finetune.targets holds 'expert'", "ffn.experts"]),
    ],
)
def test_a_wrong_override_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, overrides: list[str], says: list[str]
) -> None:
    status = cli.call(["run", "prepare", *FAST, f"paths.root={tmp_path / 'runs'}", *overrides])
    said = capsys.readouterr().err
    assert status == 2, said
    assert "Traceback" not in said
    for part in says:
        assert part in said
    assert not (tmp_path / "runs").exists()


def test_a_path_that_leads_nowhere_is_named(deepwright: Run, tmp_path: Path) -> None:
    wrong = ("data=jsonl", "data.path=nothing/*.jsonl")
    done = deepwright("run", "prepare", *FAST, f"paths.root={tmp_path / 'runs'}", *wrong)
    assert done.returncode == 2, done.stderr
    assert "nothing/*.jsonl" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").glob("stages/*/result.json"))


def test_a_corrupt_line_is_named(deepwright: Run, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n{"text": broken\n')
    done = deepwright("run", "prepare", *FAST, f"paths.root={tmp_path / 'runs'}", "data=jsonl", f"data.path={path}")
    assert done.returncode == 2, done.stderr
    assert "texts.jsonl" in done.stderr and "2" in done.stderr and "Traceback" not in done.stderr


def test_a_port_in_use_is_named(deepwright: Run, tmp_path: Path) -> None:
    model, registry = tmp_path / "model", plugins.installed().registry
    tokenizer = registry.build("tokenizer", {"name": "bpe", "vocab_size": 300}, ["what is 17 plus 25"] * 9)
    attention = {"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 8}
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 16, "layers": 1, "intermediate_size": 16}
    config = parse(ModelConfig, {**sizes, "attention": attention, "ffn": {"name": "dense"}}, "model", registry)
    save_model(build_model(registry, config, seed=0), model)
    tokenizer.save(model)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = deepwright("serve", str(model), "--port", str(port))
    assert done.returncode == 2, done.stderr
    assert str(port) in done.stderr and "Traceback" not in done.stderr
