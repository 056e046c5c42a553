"""Checkpoints: whatever happens while one is written, a whole one is found afterwards, and it is the right one."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deepwright_core.registry import Registry
from deepwright_core.training import checkpoint
from deepwright_core.training.checkpoint import Checkpoints, file_digest


class Little(nn.Module):
    """Matrices, a norm, a buffer that is saved and one that is not."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Linear(5, 4, bias=False), nn.RMSNorm(4), nn.Linear(4, 2, bias=False)
        self.register_buffer("bias", torch.zeros(3))
        self.register_buffer("table", torch.zeros(3), persistent=False)


class Run:
    """A model and its optimizer, and steps that draw random numbers."""

    def __init__(self, registry: Registry, optimizer: str = "adamw", seed: int = 0) -> None:
        self.model = Little(seed)
        self.optimizer = registry.build("optimizer", {"name": optimizer}, self.model, lr=0.1)

    def step(self) -> None:
        x = torch.randn(3, 5)
        self.optimizer.zero_grad()
        self.model.last(self.model.norm(self.model.first(x))).square().sum().backward()
        self.optimizer.step()
        self.model.bias += 1

    def weights(self) -> dict[str, list[float]]:
        return {name: tensor.flatten().tolist() for name, tensor in self.model.state_dict().items()}

    def save(self, checkpoints: Checkpoints, step: int) -> Path:
        return checkpoints.save(step, self.model, self.optimizer, {"step": step, "figures": [0.5, step]})

    def restore(self, checkpoints: Checkpoints) -> tuple[int, dict[str, Any]] | None:
        return checkpoints.restore(self.model, self.optimizer)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_run_goes_on_bit_for_bit(registry: Registry, tmp_path: Path, optimizer: str) -> None:
    run, checkpoints = Run(registry, optimizer), Checkpoints(tmp_path)
    for _ in range(3):
        run.step()
    run.save(checkpoints, 3)
    for _ in range(4):
        run.step()
    want, next_draw = run.weights(), torch.rand(2)

    again = Run(registry, optimizer, seed=9)
    torch.manual_seed(1234)
    assert again.restore(checkpoints) == (3, {"step": 3, "figures": [0.5, 3]})
    for _ in range(4):
        again.step()
    assert again.weights() == want
    assert torch.equal(torch.rand(2), next_draw)


def test_nothing_saved_nothing_restored(registry: Registry, tmp_path: Path) -> None:
    assert Run(registry).restore(Checkpoints(tmp_path / "never written")) is None
    assert not (tmp_path / "never written").exists()


def test_the_newest_are_kept(registry: Registry, tmp_path: Path) -> None:
    run, checkpoints = Run(registry), Checkpoints(tmp_path, keep=2)
    paths = [run.save(checkpoints, step) for step in (1, 9, 10, 100)]
    assert checkpoints.saved() == paths[2:] and sorted(tmp_path.iterdir()) == paths[2:]
    assert [path.name for path in paths[2:]] == ["step-00000010", "step-00000100"]
    assert run.restore(checkpoints) == (100, {"step": 100, "figures": [0.5, 100]})


# What may happen while one is written ---------------------------------------------------------------


def in_a_process_that_dies(work: Callable[[], Any], moment: int) -> bool:
    """Fork; the child is killed when it touches the file system for the `moment`-th time. True: it was killed."""
    child = os.fork()
    if child == 0:
        left = moment

        def count(event: str, arguments: Any) -> None:
            nonlocal left
            if event.startswith(("open", "os.", "shutil.")):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(registry: Registry, tmp_path: Path) -> None:
    run, checkpoints = Run(registry), Checkpoints(tmp_path, keep=2)
    states: dict[int, dict[str, list[float]]] = {}
    for step in (1, 2):
        run.step()
        run.save(checkpoints, step)
        states[step] = run.weights()
    run.step()
    states[3] = run.weights()
    moment, found = 1, []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a half-written one must not even be seen
        while in_a_process_that_dies(lambda: run.save(checkpoints, 3), moment):
            other = Run(registry, seed=5)
            restored = other.restore(checkpoints)
            assert restored is not None and other.weights() == states[restored[0]], f"killed at moment {moment}"
            found.append(restored[0])
            moment += 1
        assert len(found) > 10 and set(found) == {2, 3}
        assert run.restore(checkpoints) is not None
    run.save(checkpoints, 3)  # and goes over what the killed ones left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_a_kill_while_a_file_is_half_written(registry: Registry, tmp_path: Path) -> None:
    run, checkpoints = Run(registry), Checkpoints(tmp_path)
    run.save(checkpoints, 1)

    def half(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"\x40" * 100)
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        checkpoint.save_file = half  # in the child alone
        run.save(checkpoints, 2)

    assert in_a_process_that_dies(work, -1)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["step-00000001"]
    assert run.restore(checkpoints) == (1, {"step": 1, "figures": [0.5, 1]})


def test_a_full_disk_leaves_the_old_ones_and_no_rubbish(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, checkpoints = Run(registry), Checkpoints(tmp_path)
    kept = run.save(checkpoints, 1)

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run.save(checkpoints, 2)
    assert list(tmp_path.iterdir()) == [kept]


# What may happen afterwards -------------------------------------------------------------------------

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def change_step(path: Path) -> None:
    document = json.loads(path.read_text())
    document["step"] += 7
    path.write_text(json.dumps(document))


def forget_the_rest(path: Path) -> None:
    path.with_name("digests.json").write_text("{}")


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{f"a bit of {name}": (name, flip) for name in (*FILES, "digests.json")},
    **{f"{name} missing": (name, Path.unlink) for name in (*FILES, "digests.json")},
    **{f"{name} empty": (name, lambda path: path.write_bytes(b"")) for name in (*FILES, "digests.json")},
    "another step": ("state.json", change_step),
    "digests are a list": ("digests.json", lambda path: path.write_text("[]")),
    "digests of nothing": ("state.json", forget_the_rest),
    "weights replaced by a pickle": ("model.safetensors", lambda path: path.write_bytes(pickle.dumps({"a": 1}))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over_with_a_warning(registry: Registry, tmp_path: Path, damage: str) -> None:
    run, checkpoints = Run(registry), Checkpoints(tmp_path)
    run.step()
    run.save(checkpoints, 1)
    want = run.weights()
    run.step()
    newest = run.save(checkpoints, 2)
    name, harm = DAMAGE[damage]
    harm(newest / name)
    other = Run(registry, seed=5)
    with pytest.warns(UserWarning, match=f"checkpoint {newest} is damaged .*; going back to the one before"):
        restored = other.restore(checkpoints)
    assert restored == (1, {"step": 1, "figures": [0.5, 1]})
    assert other.weights() == want
    run.save(checkpoints, 2)  # the same step, done again, takes the damaged one's place
    assert Run(registry).restore(checkpoints) == (2, {"step": 2, "figures": [0.5, 2]})


def test_when_all_are_damaged_nothing_is_restored_and_the_model_is_untouched(
    registry: Registry, tmp_path: Path
) -> None:
    run, checkpoints = Run(registry), Checkpoints(tmp_path)
    for step in (1, 2):
        flip(run.save(checkpoints, step) / "optimizer.safetensors")
    run.step()
    before = run.weights()
    with pytest.warns(UserWarning) as caught:
        assert run.restore(checkpoints) is None
    assert len(caught) == 2 and run.weights() == before


def test_a_checkpoint_is_tensors_and_json(registry: Registry, tmp_path: Path) -> None:
    """Nothing in it can run: safetensors and JSON, and digests that anyone can check."""
    run = Run(registry, "muon")
    run.step()
    directory = run.save(Checkpoints(tmp_path), 1)
    assert sorted(path.name for path in directory.iterdir()) == sorted([*FILES, "digests.json"])
    assert load_file(directory / "model.safetensors").keys() == dict(run.model.state_dict()).keys()
    assert {name.rpartition(".")[2] for name in load_file(directory / "optimizer.safetensors")} == {
        "momentum",
        "exp_avg",
        "exp_avg_sq",
        "step",
        "cpu",
    }
    digests = json.loads((directory / "digests.json").read_text())
    assert digests == {name: file_digest(directory / name) for name in FILES}
