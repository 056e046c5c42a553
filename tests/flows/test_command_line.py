"""The command as people meet it: exit statuses, sentences without tracebacks, kills and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli, session
from flows.up import choose_ports

Deepwright = Callable[..., subprocess.CompletedProcess[str]]


def test_help_is_immediate_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom flows import cli\nassert cli.call(['--help']) == 0\n"
        "heavy = {'torch', 'prefect', 'mlflow', 'hydra', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy), file=sys.stderr)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["DEEPWRIGHT_BLOCK"] = "window,brevity"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert asked.returncode == 0 and "deepwright run pipeline" in asked.stdout
    # The registry's models are pydantic's; they are loaded only to ask plugins of others for commands.
    assert not {"torch", "prefect", "mlflow", "hydra", "numpy"} & set(asked.stderr.split("heavy:")[1].split("'"))


def test_every_command_explains_itself() -> None:
    for name in ("run", "plugins", "up", "deploy", "doctor", "model"):
        assert cli.call([name, "--help"]) == 0


def test_a_run_ends_with_0_and_a_table(deepwright: Deepwright, tmp_path: Path) -> None:
    done = deepwright("run", "pipeline")
    assert done.returncode == 0, done.stderr
    for sign in ("learn", "0 → 190", "run.cpu_watts", "deepwright serve", str(tmp_path / "runs" / "stages")):
        assert sign in done.stdout
    assert "reused" in deepwright("run", "pipeline").stdout


def test_wrong_requests_end_with_2_and_a_sentence_each(
    deepwright: Deepwright, command_environment: dict[str, str], tmp_path: Path
) -> None:
    done = deepwright("run", "learn", "learn.stepz=3", "learn.rate=fast")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("deepwright: learn.") for line in lines)
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()
    lines = ("run lern", "run", "nothing", "run learn --block twoy", "run learn -z")
    # In one process, which imports everything once.
    asked = f"from flows import cli; print([cli.call(line.split()) for line in {lines}])"
    statuses = subprocess.run([sys.executable, "-c", asked], env=command_environment, capture_output=True, text=True)
    assert statuses.stdout == f"{[2] * len(lines)}\n", statuses.stderr


def test_failed_work_ends_with_1_and_its_traceback_is_in_the_log(deepwright: Deepwright, tmp_path: Path) -> None:
    done = deepwright("run", "learn", "learn.fail=crash")
    assert done.returncode == 1
    assert "deepwright: learn failed: ValueError: the numbers do not add up" in done.stderr
    assert "Traceback" not in done.stderr
    (log,) = (tmp_path / "runs" / "history").glob("*/log.txt")
    assert "Traceback" in log.read_text()


def test_a_full_disk_is_one_sentence(deepwright: Deepwright) -> None:
    done = deepwright("run", "learn", "learn.fail=disk")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("deepwright:")]
    assert "is full" in line and "same command" in line


def test_cfg_shows_the_configuration_and_runs_nothing(deepwright: Deepwright, tmp_path: Path) -> None:
    done = deepwright("run", "learn", "--cfg", "learn.steps=3", "-m", "seed=1,2")
    assert done.returncode == 0 and done.stdout.count("steps: 3") == 2
    assert not (tmp_path / "runs").exists()


def test_a_multirun_runs_every_combination(deepwright: Deepwright, tmp_path: Path) -> None:
    done = deepwright("run", "learn", "-m", "learn.steps=4,5", "optimizer.pace=1,2")
    assert done.returncode == 0, done.stderr
    assert "Run 4 of 4: learn.steps=5 optimizer.pace=2" in done.stderr
    assert len(list((tmp_path / "runs" / "stages").glob("learn-*"))) == 4


def test_a_saved_config_runs_again(deepwright: Deepwright, tmp_path: Path) -> None:
    assert deepwright("run", "learn", "learn.steps=6").returncode == 0
    (config,) = (tmp_path / "runs" / "history").glob("*/config.yaml")
    again = deepwright("run", "learn", "--config", str(config))
    assert again.returncode == 0 and again.stderr.count("reused") == 2


def start(command_environment: dict[str, str], cwd: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        env=command_environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SAVED = "stages/learn-*/checkpoints/latest.json"


@pytest.mark.parametrize("isolate", ["false", "true"])
def test_a_killed_stage_goes_on_and_ends_as_one_that_was_never_cut(
    isolate: str,
    go: Callable[..., session.Report],
    command_environment: dict[str, str],
    deepwright: Deepwright,
    tmp_path: Path,
) -> None:
    arguments = ("run", "learn", "learn.every=1", f"run.isolate={isolate}")
    process = start({**command_environment, "TOY_HOLDS_AT": "7"}, tmp_path, *arguments)
    deadline = time.monotonic() + 90
    while not (found := [path for path in (tmp_path / "runs").glob(SAVED) if path.read_text().startswith("[7,")]):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = deepwright(*arguments)
    assert again.returncode == 0, again.stderr
    directory = found[0].parent.parent
    entered = [int(line) for line in (directory / "visits.txt").read_text().split()]
    assert entered == [0, 7], "it went on from the checkpoint"
    _, uncut = go("learn", "learn.every=1", f"paths.root={tmp_path / 'other'}").outcomes
    made, other = (at / "model" / "model.safetensors" for at in (directory, uncut.directory))
    assert made.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_go_on(
    number: signal.Signals, status: int, command_environment: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("run", "learn", "learn.pause=0.05", "learn.steps=400", "learn.every=1")
    process = start(command_environment, tmp_path, *arguments)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").glob("stages/learn-*/checkpoints/latest.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "The same command goes on" in errors and "Traceback" not in errors
    (summary,) = (tmp_path / "runs" / "history").glob("*/summary.md")
    assert summary.read_text().startswith("learn: stopped")


def test_plugins_are_listed_with_who_provides_them(deepwright: Deepwright) -> None:
    listing = json.loads(deepwright("plugins", "--json").stdout)
    walk = next(c for c in listing["components"] if c["name"] == "walk")
    assert walk == {
        "name": "walk",
        "kind": "optimizer",
        "group": "optimizer",
        "plugin": "toy",
        "distribution": "toy-for-deepwright",
        "version": "0.1",
        "doc": "Walks straight ahead.",
    }
    assert set(listing["blocked"]) == {"core", "moe", "mla", "rl", "serve"}
    assert "Walks straight ahead." in deepwright("plugins", "--kind", "optimizer").stdout
    assert deepwright("plugins", "--kind", "optimiser").returncode == 2
    assert json.loads(deepwright("plugins", "--json", "--block", "toy").stdout)["components"] == []


def test_a_plugin_adds_a_command(deepwright: Deepwright) -> None:
    assert deepwright("wave").stdout == "hello from a plugin\n"
    assert "Says hello." in deepwright("--help").stdout
    assert deepwright("wave", DEEPWRIGHT_BLOCK="core,moe,mla,rl,serve,toy").returncode == 2


def test_doctor_tells_what_it_found(deepwright: Deepwright) -> None:
    findings = {f["what"]: f for f in json.loads(deepwright("doctor", "--json").stdout)}
    assert {"Python", "packages", "plugins", "configuration", "memory", "disk", "torch"} <= findings.keys()
    assert findings["configuration"]["state"] == "ok"


def test_a_port_in_use_is_refused(deepwright: Deepwright) -> None:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = deepwright("up", "--prefect-port", str(port))
        assert done.returncode == 2
        assert f"--prefect-port {port}: the port is in use" in done.stderr and len(done.stderr.splitlines()) == 1
        # Only a port that was asked for must be free.
        assert port not in choose_ports(None, None)


def test_deploy_without_a_server_is_refused(deepwright: Deepwright) -> None:
    done = deepwright("deploy")
    assert done.returncode == 2 and "Nothing to deploy to" in done.stderr
