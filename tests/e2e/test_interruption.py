"""SIGKILL at any moment: the same command goes on, and ends with the weights of a run that was never cut."""

import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Run, command, environment, run_in

LONG_ENOUGH_TO_KILL = (
    "pretrain.steps=120",
    "pretrain.save_every=5",
    "pretrain.evaluate_every=0",
    "sft.steps=20",
    "rl.steps=12",
)


def arguments(root: Path, target: str) -> list[str]:
    fixed = ["experiment=smoke", f"paths.root={root}", "run.workflow=none", "tracking=jsonl", "threads=1"]
    return ["run", target, *fixed, *LONG_ENOUGH_TO_KILL]


def weights(root: Path, stage: str) -> str:
    (path,) = root.glob(f"stages/{stage}-*/model/model.safetensors")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kill_after(root: Path, target: str, steps: int) -> None:
    """Start the command and kill it, with no chance to clean up, once that many steps of its stage are saved."""
    process = subprocess.Popen(
        command(*arguments(root, target)), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not any(int(path.name[-8:]) >= steps for path in root.glob(f"stages/{target}-*/checkpoints/step-*")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root in which everything up to the reinforcement was done without a cut."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_in(folder, *arguments(folder / "runs", "rl"))
    assert done.returncode == 0, done.stderr
    return folder / "runs"


@pytest.fixture
def begin(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a root in which these stages are done already, as those of the whole run."""

    def copy(*stages: str) -> Path:
        for stage in stages:
            (made,) = whole.glob(f"stages/{stage}-*")
            shutil.copytree(made, tmp_path / "cut" / "stages" / made.name)
        return tmp_path / "cut"

    return copy


def test_a_killed_pretraining_ends_bit_for_bit_like_one_that_was_not(
    deepwright: Run, whole: Path, begin: Callable[..., Path]
) -> None:
    cut = begin("prepare")
    kill_after(cut, "pretrain", 10)
    assert not list(cut.glob("stages/pretrain-*/result.json"))
    kill_after(cut, "pretrain", 30)
    again = deepwright(*arguments(cut, "pretrain"))
    assert again.returncode == 0, again.stderr
    assert weights(cut, "pretrain") == weights(whole, "pretrain")


@pytest.mark.slow
def test_a_killed_reinforcement_ends_bit_for_bit_like_one_that_was_not(
    deepwright: Run, whole: Path, begin: Callable[..., Path]
) -> None:
    cut = begin("prepare", "pretrain", "sft")
    kill_after(cut, "rl", 2)
    again = deepwright(*arguments(cut, "rl"))
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("reused") == 3
    assert weights(cut, "rl") == weights(whole, "rl")


def test_a_corrupt_newest_checkpoint_falls_back_and_says_so(
    deepwright: Run, whole: Path, begin: Callable[..., Path]
) -> None:
    cut = begin("prepare")
    kill_after(cut, "pretrain", 20)
    newest = sorted(cut.glob("stages/pretrain-*/checkpoints/step-*"))[-1]
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)
    again = deepwright(*arguments(cut, "pretrain"))
    assert again.returncode == 0, again.stderr
    assert "damaged" in again.stdout + again.stderr
    assert weights(cut, "pretrain") == weights(whole, "pretrain")
