"""`deepwright serve`: what it refuses before anything is loaded, and how a real server process begins and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from deepwright_core.errors import RequestError, WorkError
from deepwright_serve import child, command
from deepwright_serve.keys import Keys


def test_a_port_in_use_is_one_sentence_and_status_2(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["serve", str(model_directory), "--port", str(port)])
        with pytest.raises(SystemExit) as ended:
            command.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"Port {port} on 127.0.0.1 is in use;") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "give --api-key-file"),
        (["--host", "::"], "give --api-key-file"),
        (["--host", "no such host"], "give --api-key-file"),
        (["--api-key-file", "missing"], "missing cannot be read"),
        (["--port", "70000"], "--port"),
        (["--price-input", "1"], "without --price-input or --price-output"),
        (["--drain-seconds", "-1"], "--drain-seconds is -1"),
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--cache-dtype", "fp4"], "--cache-dtype"),
        (["--cache-dtype", "fp8"], "has no FP8 cache"),
        (["--speculate", "4"], "--speculate"),
        (["--speculate", "1"], "speculate is 1, and the model has no MTP module"),
    ],
)
def test_wrong_options(
    model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", str(model_directory), "--port", "0", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  a-key-that-is-long-enough  \n")
    keys = Keys.read(path)
    assert keys.admit("Bearer a-key-that-is-long-enough") and keys.admit("Bearer # ours") is None
    for content, words in (("# none\n", "holds no key"), ("short\n", "fewer than")):
        path.write_text(content)
        with pytest.raises(RequestError, match=words):
            Keys.read(path)


def test_loopback() -> None:
    assert all(command.is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(command.is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"))


# Processes ------------------------------------------------------------------------------------------

OPTIONS = ["--threads", "1", "--name", "tiny"]


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie nobody has waited for counts as ended)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.costly
def test_sigterm_lets_a_short_answer_finish_and_cuts_a_long_one(model_directory: Path, tmp_path: Path) -> None:
    options = [*OPTIONS, "--drain-seconds", "1"]
    server = child.start(model_directory, tmp_path, options, port=0, keep=False, limit=60)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0}
    try:
        assert httpx.get(f"{server.address}/health").status_code == 200
        with (
            httpx.Client(base_url=server.address, timeout=60) as client,
            client.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 60_000}) as long,
            client.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 20}) as short,
        ):
            from_long, from_short = long.iter_raw(), short.iter_raw()
            next(from_long), next(from_short)
            os.kill(server.pid, signal.SIGTERM)
            assert b"".join(from_short).endswith(b"data: [DONE]\n\n")
            cut_off = b"".join(from_long).decode()
            assert '"code":"engine_failed"' in cut_off and "shutting down" in cut_off
        assert server.process.wait(30) == 0
    finally:
        server.stop(5)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.costly
def test_the_server_ends_with_the_process_that_started_it(model_directory: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from pathlib import Path; from deepwright_serve import child\n"
            "server = child.start(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:], port=0, keep=False, limit=60)\n"
            "print(server.pid, flush=True); time.sleep(600)",
            str(model_directory),
            str(tmp_path),
            *OPTIONS,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    try:
        pid = int(parent.stdout.readline())
        assert not gone(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + 30
    while not gone(pid):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.05)


def test_a_server_that_cannot_start_tells_why(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"status 2 .*\n.*does not exist"):
        child.start(tmp_path / "nowhere", tmp_path / "logs", [], port=0, keep=False, limit=60)


@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16", "fp8"])
def test_a_server_takes_each_precision_of_training(precision: str) -> None:
    options = child.model_options(precision, 2)
    taken = command.serve_command.make_context("serve", ["model", *options]).params
    assert taken["precision"] == ("bf16" if precision == "fp8" else precision) and taken["threads"] == 2
