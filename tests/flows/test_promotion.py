"""`deepwright promote`: a version that is good enough goes live; any other leaves all as it was, and it is said why.

The server is a real one around engines that say what they are told; the registry is MLflow's.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from deepwright_core.errors import RequestError, WorkError
from deepwright_core.plugins import Plugins, installed
from deepwright_core.stage import StageResult
from deepwright_core.tasks import Problem, dump_problems
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.check import Check
from deepwright_serve.command import serve_command
from deepwright_serve.going_live import GoingLive
from deepwright_serve.keys import Keys
from deepwright_serve.limits import Limits
from deepwright_serve.loading import Loading
from deepwright_serve.roster import Roster, Served
from deepwright_serve.scheduling import EngineThread
from deepwright_serve.service import Service
from flows import cli, mlflow_tracker, promotion, registered_model
from flows.promotion import Promotion, Wish
from flows.stage_directory import StageDirectory

# The scripted engine and the servers around it stand beside the server's tests; here they are used as they are.
_place = Path(__file__).parents[1] / "serve" / "conftest.py"
_spec = importlib.util.spec_from_file_location("serve_fixtures_for_flows", _place)
assert _spec is not None and _spec.loader is not None
_serve: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_serve)
tokenizer = _serve.tokenizer

IDENTITY = "a" * 64
CHECK = Check(problems=6, concurrency=3, max_tokens=40, slower=1000)


@dataclass(frozen=True)
class Scripted(Loading):
    """Engines that add (`right`), that do not (`wrong`), that add and then break (`breaks`), that cannot be loaded."""

    tokenizer: Any = None

    def load(self, directory: Path, name: str, version: str = "") -> Served:
        kind = directory.parent.name.split("-")[0]
        if kind == "unreadable":
            raise RequestError(f"{directory}: the weights are cut off.")

        def script(prompt: list[int]) -> list[int]:
            asked = re.findall(r"(\d+) \+ 1", self.tokenizer.decode(prompt))
            if kind == "breaks" and not asked:
                engine.fail = 10**6
            return list(self.tokenizer.encode(str(int(asked[-1]) + 1) if asked and kind != "wrong" else "I know not"))

        engine = _serve.ScriptedEngine(script, self.tokenizer.eos_id)
        return Served(name, EngineThread(engine, self.limits), self.tokenizer, 256, version, directory=directory)

    def bytes_of(self, directory: Path) -> int:
        return 1


class Registry:
    """Versions in a registry, a server on which the first of them is live, and `deepwright promote` in this process."""

    def __init__(self, root: Path, client: MlflowClient, tokenizer: Tokenizer, plugins: Plugins) -> None:
        self.root, self.client, self.plugins = root, client, plugins
        self.loading = Scripted(limits=Limits(health_seconds=0.5), tokenizer=tokenizer)
        self.address = ""
        client.create_registered_model("deepwright")
        prepare = StageDirectory.of(root, "prepare", IDENTITY)
        (prepare.path / "problems").mkdir(parents=True)
        question = "State the final answer to the following arithmetic problem: {} + 1 ="
        problems = [Problem(f"{n:064x}", "chain_sum", question.format(n), str(n + 1), {}, "") for n in range(9)]
        (prepare.path / "problems" / "test.jsonl").write_text(dump_problems(problems))
        prepare.finish(prepare.describe(StageResult({"problems": "problems"}, {}), 1.0, {}))
        self.experiment = client.create_experiment("deepwright", artifact_location=(root / "artifacts").as_uri())
        (root / "operator.key").write_text("the-operators-own-key\n")

    def add(self, kind: str) -> str:
        """A version of a kind; the newest is the candidate and the first the champion, as after a pipeline's run."""
        directory = self.root / "stages" / f"{kind}-{len(self.versions())}" / "model"
        directory.mkdir(parents=True)
        (directory / "config.json").write_text("{}")
        tags = {"deepwright.directory": str(directory.parent), "deepwright.stage": "rl"}
        run = self.client.create_run(self.experiment, tags=tags)
        made = self.client.create_model_version(
            "deepwright", str(directory), run.info.run_id, tags={"stage.prepare": IDENTITY}
        )
        self.client.set_registered_model_alias("deepwright", "candidate", made.version)
        if str(made.version) == "1":
            self.client.set_registered_model_alias("deepwright", "champion", made.version)
        return str(made.version)

    def versions(self) -> list[Any]:
        return list(self.client.search_model_versions("name = 'deepwright'"))

    def directory(self, version: str) -> Path:
        run = self.client.get_run(self.client.get_model_version("deepwright", version).run_id)
        return Path(run.data.tags["deepwright.directory"]) / "model"

    @property
    def aliases(self) -> dict[str, str]:
        found = self.client.get_registered_model("deepwright").aliases
        return {alias: str(version) for alias, version in found.items()}

    def tags(self, version: str) -> dict[str, str]:
        return dict(self.client.get_model_version("deepwright", version).tags)

    def wish(self, source: str = "deepwright@candidate", **fields: Any) -> Wish:
        key = str(self.root / "operator.key")
        wanted: dict[str, Any] = {"check": CHECK, "prove_seconds": 0.2, "admin_key_file": key, "server": self.address}
        return Wish(source, overrides=(f"paths.root={self.root}",), **{**wanted, **fields})

    def promote(self, source: str = "deepwright@candidate", **fields: Any) -> Promotion:
        from deepwright_core.tracking import SilentProgress

        class Quiet(SilentProgress):
            def stage(self, name: str) -> None:
                return

            def say(self, text: str) -> None:
                return

            def close(self) -> None:
                return

        return promotion.promote(self.wish(source, **fields), self.plugins, Quiet())

    def answer(self, question: str = "What is 20 + 1?") -> str:
        body = {"model": "deepwright", "messages": [{"role": "user", "content": question}]}
        reply = httpx.post(f"{self.address}/v1/chat/completions", json=body, timeout=20, trust_env=False).json()
        return str(reply["error"]["message"] if "error" in reply else reply["choices"][0]["message"]["content"])

    def loaded(self) -> list[str]:
        headers = {"Authorization": "Bearer the-operators-own-key"}
        models = httpx.get(f"{self.address}/admin/models", headers=headers, trust_env=False).json()["models"]
        return [model["version"] for model in models]


@pytest.fixture
def registry(
    database: bytes, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], Registry]]:
    """A registry whose first version is of the given kind and live on a server."""
    monkeypatch.delenv("DEEPWRIGHT_CONF")
    root = tmp_path / "runs"
    (root / "mlflow").mkdir(parents=True)
    (root / "mlflow" / "mlflow.db").write_bytes(database)
    made = Registry(root, mlflow_tracker.client_at(root, ""), tokenizer, installed())
    stack: list[Any] = []

    def start(kind: str) -> Registry:
        version = made.add(kind)
        roster = Roster([made.loading.load(made.directory(version), "deepwright", version)])
        changes = GoingLive(roster, made.loading, [root], 5)
        operator = Keys(["the-operators-own-key"])
        stack.append(_serve.running(Service(roster, made.loading.limits, None, True, operator, changes)))
        made.address = stack[-1].__enter__().address
        return made

    yield start
    for server in stack:
        server.__exit__(None, None, None)


def test_a_better_version_goes_live_and_is_champion(registry: Callable[[str], Registry]) -> None:
    ours = registry("wrong")
    version = ours.add("right")
    assert ours.answer() == "I know not"
    done = ours.promote()
    assert done.state == "live" and done.verdict is not None and done.verdict.candidate.accuracy == 1.0
    assert ours.answer() == "21" and ours.loaded() == [version]
    assert ours.aliases == {"candidate": version, "champion": version, "previous": "1"}
    tags = ours.tags(version)
    assert tags["check"] == "live" and tags["check.against"] == "version 1"
    assert (tags["check.candidate.accuracy"], tags["check.live.accuracy"]) == ("1", "0")
    lines = done.markdown.splitlines()
    assert "| 6 held-out problems | before: version 1 | deepwright version 2 |" in lines
    assert "| right answers | 0.0% | 100.0% |" in lines and "has proved itself" in done.markdown
    with pytest.raises(RequestError, match=r"is live at http://.* already"):
        ours.promote()


def test_a_worse_version_stays_out_unless_it_is_wanted_anyway(registry: Callable[[str], Registry]) -> None:
    ours = registry("right")
    version = ours.add("wrong")
    done = ours.promote()
    assert done.state == "refused" and "accuracy_lost allows 5.0% less" in done.message
    assert ours.answer() == "21" and ours.loaded() == ["1"] and ours.aliases["champion"] == "1"
    assert ours.tags(version)["check"] == "refused" and "accuracy" in ours.tags(version)["check.why"]
    with pytest.raises(WorkError, match="stays out"):
        promotion.settle(done)
    assert ours.promote(anyway=True).state == "live"
    assert ours.answer() == "I know not"
    # Back again: the version before is an ordinary version.
    assert ours.promote("deepwright@previous").state == "live"
    assert ours.aliases == {"candidate": version, "champion": "1", "previous": version}


def test_a_version_that_cannot_be_loaded_leaves_the_live_one(registry: Callable[[str], Registry]) -> None:
    ours = registry("right")
    version = ours.add("unreadable")
    done = ours.promote()
    assert done.state == "failed" and done.verdict is None and "the weights are cut off" in done.markdown
    assert ours.answer() == "21" and ours.loaded() == ["1"] and ours.aliases["champion"] == "1"
    assert "cut off" in ours.tags(version)["check.why"]


def test_a_version_that_breaks_once_it_is_live_is_taken_back(registry: Callable[[str], Registry]) -> None:
    ours = registry("right")
    version = ours.add("breaks")
    over = threading.Event()
    answers: list[str] = []

    def users() -> None:
        while not over.is_set():
            answers.append(ours.answer("What is 20 + 1?" if ours.loaded()[0] == "1" else "And now?"))

    client = threading.Thread(target=users)
    client.start()
    try:
        done = ours.promote(prove_seconds=30.0)
    finally:
        over.set()
        client.join(20)
    assert done.state == "taken back"
    assert "its engine has stopped" in done.message or "answers failed" in done.message
    assert ours.answer() == "21" and ours.loaded() == ["1"] and ours.aliases["champion"] == "1"
    assert ours.tags(version)["check"] == "taken back"
    assert "21" in answers


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("deepwright@nobody", {}, "'deepwright@nobody' is not known to the tracker"),
    ("deepwright/7", {}, "'deepwright/7' is not known to the tracker"),
    ("nothing like it", {}, "expected one of them"),
    ("deepwright/2", {"admin_key_file": ""}, "give its operator's key with --admin-key-file"),
    ("deepwright/2", {"admin_key_file": "no/such/file"}, "cannot be read"),
    ("deepwright/2", {"problems_file": "no/such/file"}, "does not exist"),
    ("deepwright/1", {"server": "", "admin_key_file": ""}, "version 1 is the champion already"),
    ("deepwright/2", {"server": ""}, "name the server with --server as well"),
    ("deepwright/2", {"name": "another"}, "there is deepwright: name the one to replace"),
]


def test_wrong_wishes_are_refused_in_a_sentence(registry: Callable[[str], Registry]) -> None:
    ours = registry("right")
    ours.add("right")
    for source, fields, words in WRONG:
        with pytest.raises(RequestError, match=re.escape(words)):
            ours.promote(source, **fields)
    with pytest.raises(WorkError, match="No server of ours answers"):
        ours.promote("deepwright/2", server="http://127.0.0.1:9")
    with pytest.raises(RequestError, match="name a file of problems with --problems-file"):
        ours.promote(str(ours.directory("2")))
    assert ours.loaded() == ["1"] and "check" not in ours.tags("2")


def test_the_flow_shows_before_and_after(
    registry: Callable[[str], Registry], prefect_api: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows import promote_flow

    ours = registry("wrong")
    ours.add("right")
    key, overrides = str(ours.root / "operator.key"), [f"paths.root={ours.root}"]
    fields: dict[str, Any] = {"server": ours.address, "admin_key_file": key, "check": CHECK, "overrides": overrides}
    assert promote_flow.promote("deepwright@candidate", prove_seconds=0.2, **fields) == "live"
    assert "right answers" in capsys.readouterr().out
    wrong = ours.add("wrong")
    with pytest.raises(WorkError, match="stays out"):
        promote_flow.promote(f"deepwright/{wrong}", prove_seconds=0.2, **fields)
    shown = httpx.post(f"{prefect_api}/artifacts/filter", json={"artifacts": {"key": {"any_": ["promotion"]}}}).json()
    tables = [artifact["data"] for artifact in shown]
    assert len(tables) == 2 and all("| right answers |" in table for table in tables)
    assert any("version 3: refused" in table for table in tables)
    runs = httpx.post(f"{prefect_api}/flow_runs/filter", json={"flows": {"name": {"any_": ["promote"]}}}).json()
    assert sorted(run["state_type"] for run in runs) == ["COMPLETED", "FAILED"]
    assert "the-operators-own-key" not in str(runs)


def test_serve_takes_every_name(registry: Callable[[str], Registry], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = registry("right")
    monkeypatch.setenv("DEEPWRIGHT_ROOT", str(ours.root))
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(serve_command, "callback", lambda **options: seen.append(options))
    names = ["deepwright@champion", "models:/deepwright/1", str(ours.directory("1").parent)]
    assert [cli.call(["serve", name, "--port", "0"]) for name in names] == [0, 0, 0]
    assert {options["model"] for options in seen} == {ours.directory("1")}
    assert [options["version"] for options in seen] == ["1", "1", ""] and seen[0]["port"] == 0
    assert cli.call(["serve", "deepwright@nobody"]) == 2 and cli.call(["serve"]) == 2


def test_crowning(registry: Callable[[str], Registry]) -> None:
    ours = registry("right")
    assert registered_model.crown(ours.client, "deepwright", "1") is None and "previous" not in ours.aliases
    assert registered_model.crown(ours.client, "deepwright", ours.add("right")) == "1"
