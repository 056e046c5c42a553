"""A stage's directory on the disk: its lock, its result, and whether that result can be used again.

`<root>/stages/<stage>-<identity>/result.json` is written last and atomically: where it stands and its outputs are as
recorded, the stage is done. Where it does not, the stage is entered again and goes on from its own checkpoints.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepwright_core.stage import RESULT_FILE, StageResult, write_atomically

from . import fingerprint

LOCK_FILE = ".lock"
MADE_FROM_FILE = "made_from.json"


@dataclass(frozen=True)
class Finished:
    """A result as recorded. `record` is the whole of result.json."""

    result: StageResult
    digests: Mapping[str, str]
    seconds: float
    record: Mapping[str, Any]


@dataclass(frozen=True)
class StageDirectory:
    """Where a stage with one identity lives."""

    path: Path
    stage: str
    identity: str

    @classmethod
    def of(cls, root: Path, stage: str, identity: str) -> StageDirectory:
        return cls(root / "stages" / f"{stage}-{identity[:12]}", stage, identity)

    def finished(self) -> tuple[Finished | None, str | None]:
        """(the result if it can be used, otherwise why an existing one cannot)."""
        try:
            record = json.loads((self.path / RESULT_FILE).read_text())
            if record["identity"] != self.identity:
                return None, f"{self.path} belongs to another configuration"
            for name, relative in record["outputs"].items():
                damage = fingerprint.damage(self.path / relative, record["files"][name])
                if damage:
                    return None, damage
            return Finished(StageResult.from_record(record), record["digests"], record["seconds"], record), None
        except FileNotFoundError:
            return None, None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None, f"{self.path / RESULT_FILE} cannot be read"

    def describe(self, result: StageResult, seconds: float, facts: Mapping[str, Any]) -> dict[str, Any]:
        """What result.json will say."""
        files = {name: fingerprint.record(self.path / relative) for name, relative in result.outputs.items()}
        return {
            "stage": self.stage,
            "identity": self.identity,
            **result.as_record(),
            "seconds": seconds,
            "digests": {name: fingerprint.digest_of(entries) for name, entries in files.items()},
            "files": files,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **facts,
        }

    def finish(self, record: Mapping[str, Any]) -> Finished:
        """Write the result; from here on the stage is done."""
        write_atomically(self.path / RESULT_FILE, json.dumps(dict(record), indent=1))
        finished, why = self.finished()
        assert finished is not None, why
        return finished

    def enter(self, made_from: Mapping[str, Any]) -> None:
        """Make the directory, say what it is made from, and drop a result that cannot be used."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / RESULT_FILE).unlink(missing_ok=True)
        write_atomically(self.path / MADE_FROM_FILE, json.dumps(made_from, indent=1, sort_keys=True, default=str))

    def clear(self) -> None:
        """Remove everything but the lock, so that the stage starts from nothing."""
        (self.path / RESULT_FILE).unlink(missing_ok=True)
        for entry in list(self.path.iterdir()) if self.path.is_dir() else []:
            if entry.name == LOCK_FILE:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    @contextmanager
    def locked(self, waiting: Callable[[str], None]) -> Iterator[None]:
        """Only one process at a time works in the directory; a second one says so and waits.

        The lock belongs to the open file, so it goes with its process, however that ends.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK_FILE).open("a+") as file:
            told = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        file.seek(0)
                        holder = file.read().strip() or "unknown"
                        waiting(f"{self.stage} is being run by process {holder}; waiting for it to finish.")
                        told = True
                    time.sleep(0.2)
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield
