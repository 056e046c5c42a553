"""Wrong requests: one clear sentence a problem on stderr, exit status 2, and nothing begun."""

import socket
from pathlib import Path

import pytest

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
        (["data=jsonl", "data.path=nothing/*.jsonl"], ["nothing/*.jsonl"]),
        (["model.init=nothing", "distill.student.init=nothing"], ["model.init: ", "distill.student.init: ", "nothing"]),
        (["finetune=lora", "finetune.targets=[attention,expert]"], ["finetune.targets holds 'expert'", "ffn.experts"]),
    ],
)
def test_a_wrong_override_is_one_sentence(
    deepwright: Run, tmp_path: Path, overrides: list[str], says: list[str]
) -> None:
    done = deepwright("run", "prepare", *FAST, f"paths.root={tmp_path / 'runs'}", *overrides)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in says:
        assert part in done.stderr
    assert not list((tmp_path / "runs").glob("stages/*/result.json"))


def test_a_corrupt_line_is_named(deepwright: Run, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n{"text": broken\n')
    done = deepwright("run", "prepare", *FAST, f"paths.root={tmp_path / 'runs'}", "data=jsonl", f"data.path={path}")
    assert done.returncode == 2, done.stderr
    assert "texts.jsonl" in done.stderr and "2" in done.stderr and "Traceback" not in done.stderr


def test_a_port_in_use_is_named(deepwright: Run, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert deepwright("run", "pretrain", *FAST, f"paths.root={root}", "threads=1").returncode == 0
    model = next(root.glob("stages/pretrain-*/model"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = deepwright("serve", str(model), "--port", str(port))
    assert done.returncode == 2, done.stderr
    assert str(port) in done.stderr and "Traceback" not in done.stderr
