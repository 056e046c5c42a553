"""A server as a child process: started on a free port, known by its address file, ended with its parent.

The child holds the reading end of a pipe as its standard input and ends when that closes. The kernel closes the
writing end with the parent, however the parent dies, and unlike a death signal that does not depend on which of the
parent's threads started the child. A server that is to be kept gets no pipe and its own session instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from deepwright_core.errors import WorkError

TAIL_LINES = 15


@dataclass
class ServerProcess:
    """A running server and how to reach it."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def stop(self, limit: float) -> int:
        """Ask it to end, wait at most `limit` seconds, then kill it; its exit status."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.terminate()
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def model_options(precision: str, threads: int) -> list[str]:
    """The server's options for a model that was trained so. fp8 is a form of training's products: its weights are those
    of bf16."""
    return ["--precision", "bf16" if precision == "fp8" else precision, "--threads", str(threads)]


def start(
    model: Path, directory: Path, options: Sequence[str], *, port: int, keep: bool, limit: float
) -> ServerProcess:
    """Start a server for a model directory and wait until it is ready; `WorkError` with its log's tail if it is not.

    Its log and address file lie in `directory`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    address_file, log = directory / "address.json", directory / "server.log"
    address_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "deepwright_serve", str(model.resolve()), "--port", str(port), *options]
    command += ["--address-file", str(address_file.resolve())]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command if keep else [*command, "--end-with-stdin"],
            stdin=subprocess.DEVNULL if keep else subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=keep,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    server = ServerProcess(process, "", log)
    try:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise WorkError(f"The server ended with status {process.returncode} before it was ready:\n{tail(log)}")
            if address_file.exists():
                server.address = json.loads(address_file.read_text())["address"]
                if httpx.get(f"{server.address}/ready", timeout=10, trust_env=False).status_code == 200:
                    return server
            time.sleep(0.05)
        raise WorkError(f"The server was not ready within {limit:g} s:\n{tail(log)}")
    except BaseException:
        server.stop(5)
        raise


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
