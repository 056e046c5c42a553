"""A version's way into a running server: who may ask for it, from where, and when the one before comes back."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepwright_core.errors import RequestError
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve import operator_key
from deepwright_serve.going_live import GoingLive
from deepwright_serve.keys import Keys
from deepwright_serve.limits import Limits
from deepwright_serve.loading import Loading
from deepwright_serve.roster import Roster, Served
from deepwright_serve.scheduling import EngineThread
from deepwright_serve.service import Service

from .conftest import Running, ScriptedEngine, running

OPERATOR = "the-operators-own-key"
USER = "a-key-of-some-user"


@dataclass(frozen=True)
class Scripted(Loading):
    """Loads engines that say the name of their directory."""

    tokenizer: Any = None
    engines: dict[str, ScriptedEngine] = field(default_factory=dict)

    def load(self, directory: Path, name: str, version: str = "") -> Served:
        if directory.name == "broken":
            raise KeyError("model.embed_tokens.weight")
        engine = ScriptedEngine(lambda prompt: self.tokenizer.encode(f"I am {directory.name}."), self.tokenizer.eos_id)
        self.engines[directory.name] = engine
        return Served(name, EngineThread(engine, self.limits), self.tokenizer, 256, version, directory=directory)

    def bytes_of(self, directory: Path) -> int:
        return 1 << 60 if directory.name == "huge" else 1


class Server(Running):
    """A running service with an operator."""

    loading: Scripted
    models: Path

    def admin(self, path: str = "", key: str = OPERATOR, **body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"}
        if not body:
            return self.client.get("/admin/models", headers=headers)
        return self.client.post(f"/admin/models{path}", headers=headers, json=body)

    def load(self, directory: str, version: str = "") -> httpx.Response:
        return self.admin(name="tiny", directory=str(self.models / directory), version=version)

    def says(self, key: str = USER, model: str = "tiny") -> str:
        reply = self.client.post(
            "/v1/chat/completions",
            headers={"Authorization": f"Bearer {key}"},
            json={"model": model, "messages": [{"role": "user", "content": "Who are you?"}]},
        )
        body = reply.json()
        return str(body["error"]["message"] if "error" in body else body["choices"][0]["message"]["content"])

    def change(self, wanted: str) -> str:
        """Wait until the latest change has come to a state; its message."""
        deadline = time.monotonic() + 10
        while True:
            (change,) = self.admin().json()["changes"]
            if change["state"] == wanted:
                return str(change["message"])
            assert time.monotonic() < deadline, change
            time.sleep(0.01)

    def states(self) -> dict[str, str]:
        return {model["id"]: model["version"] for model in self.admin().json()["models"]}


@pytest.fixture
def server(tokenizer: Tokenizer, tmp_path: Path) -> Iterator[Server]:
    models = tmp_path / "models"
    for name in ("one", "two", "three", "broken", "huge"):
        (models / name).mkdir(parents=True)
        (models / name / "config.json").write_text("{}")
    with serving(tokenizer, models) as server:
        yield server


@contextmanager
def serving(tokenizer: Tokenizer, models: Path) -> Iterator[Server]:
    loading = Scripted(limits=Limits(health_seconds=0.3), tokenizer=tokenizer)
    roster = Roster([loading.load(models / "one", "tiny", "1")])
    changes = GoingLive(roster, loading, [models], 5)
    service = Service(roster, loading.limits, Keys([USER]), True, Keys([OPERATOR]), changes)
    with running(service) as served:
        served.__class__ = Server
        assert isinstance(served, Server)
        served.loading, served.models = loading, models
        yield served


def test_only_the_operator_and_only_from_below_the_given_directories(server: Server, tmp_path: Path) -> None:
    assert server.admin(key="wrong-key-wrong-key").status_code == 401
    for reply in (server.admin(key=USER), server.admin(key=USER, name="tiny", directory=str(server.models / "two"))):
        assert reply.status_code == 403 and "Only the operator" in reply.json()["error"]["message"]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    (server.models / "link").symlink_to(outside)
    (server.models / "stage").mkdir()
    (server.models / "stage" / "result.json").write_text(json.dumps({"outputs": {"model": str(outside)}}))
    for directory in ("link", "../outside", "stage"):
        reply = server.load(directory)
        assert reply.status_code == 403 and "--admin-models" in reply.json()["error"]["message"], directory
    assert server.admin(name="tiny", directory="models/two").status_code == 403
    assert server.admin(name="tiny", directory="/\x00").status_code in (400, 403)
    assert server.load("nowhere").json()["error"]["message"].endswith("the directory of a finished stage.")
    assert server.states() == {"tiny": "1"} and server.says() == "I am one."


def test_without_an_operator_there_are_no_such_routes(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    assert server.client.get("/admin/models").status_code == 404
    assert "/admin/models" not in server.client.get("/openapi.json").json()["paths"]


def test_what_cannot_be_loaded_changes_nothing(server: Server) -> None:
    broken = server.load("broken")
    assert broken.status_code == 400 and "KeyError: 'model.embed_tokens.weight'" in broken.json()["error"]["message"]
    huge = server.load("huge")
    assert huge.status_code == 507 and "GiB" in huge.json()["error"]["message"]
    assert server.states() == {"tiny": "1"} and server.says() == "I am one."
    for path in ("/live", "/discard", "/rollback"):
        assert server.admin(path, name="tiny").status_code == 409


@pytest.mark.costly
def test_a_candidate_is_the_operators_alone_until_it_goes_live(server: Server) -> None:
    assert server.load("two", "2").json()["changes"][0]["state"] == "loaded"
    assert server.says(OPERATOR, "tiny:candidate") == "I am two."
    assert "There is no model 'tiny:candidate'" in server.says(USER, "tiny:candidate")
    cards = server.client.get("/v1/models", headers={"Authorization": f"Bearer {USER}"}).json()["data"]
    assert [card["id"] for card in cards] == ["tiny"] and server.says() == "I am one."
    # Another candidate takes its place, and is given up.
    server.load("three", "3")
    assert server.states() == {"tiny": "1", "tiny:candidate": "3"}
    server.admin("/discard", name="tiny")
    assert server.states() == {"tiny": "1"}
    server.load("two", "2")
    server.admin("/live", name="tiny", prove_seconds=0.3)
    assert server.says() == "I am two."
    assert "has proved itself" in server.change("proved")
    engine = weakref.ref(server.loading.engines.pop("one"))
    del server.served, server.engine
    while "tiny:previous" in server.states():
        time.sleep(0.01)
    until_dead(engine)
    assert server.admin("/rollback", name="tiny").json()["error"]["code"] == "no_previous"


def until_dead(engine: weakref.ref[Any]) -> None:
    deadline = time.monotonic() + 20
    while engine() is not None:
        assert time.monotonic() < deadline, "the engine is still in memory"
        time.sleep(0.01)
        gc.collect()


def test_the_operator_takes_a_version_back(server: Server) -> None:
    server.load("two", "2")
    server.admin("/live", name="tiny", prove_seconds=60)
    assert server.admin("/live", name="tiny").json()["error"]["code"] == "busy"
    assert server.states() == {"tiny": "2", "tiny:previous": "1"} and server.says() == "I am two."
    assert server.says(OPERATOR, "tiny:previous") == "I am one."
    server.admin("/rollback", name="tiny")
    assert server.says() == "I am one." and "operator asked" in server.change("rolled back")
    assert server.states() == {"tiny": "1"}


def test_a_further_name_comes_and_goes(server: Server) -> None:
    server.admin(name="second", directory=str(server.models / "two"), version="2")
    server.admin("/live", name="second")
    assert server.says(model="second") == "I am two." and server.says() == "I am one."
    server.admin("/remove", name="second")
    assert "There is no model 'second'" in server.says(model="second")
    assert server.admin("/remove", name="tiny").json()["error"]["code"] == "last_model"
    assert server.admin("/remove", name="nobody").status_code == 404 and server.states() == {"tiny": "1"}


def test_failing_answers_bring_the_version_before_back(server: Server) -> None:
    server.load("two", "2")
    server.admin("/live", name="tiny", prove_seconds=60, failed_share=0.3)
    for _ in range(3):
        assert server.says() == "I am two."
        server.loading.engines["two"].fail = 1
        assert "on fire" in server.says()
    assert "answers failed (allowed: 30%)." in server.change("rolled back")
    assert server.says() == "I am one." and server.states() == {"tiny": "1"}


def test_an_engine_that_gives_no_token_is_taken_back(server: Server) -> None:
    server.load("two", "2")
    server.loading.engines["two"].gate.clear()
    server.admin("/live", name="tiny", prove_seconds=60)
    assert "No token was generated" in server.change("rolled back")
    assert server.says() == "I am one."
    server.loading.engines["two"].gate.set()


def test_streams_go_on_through_swaps_and_rollbacks(server: Server) -> None:
    stop = threading.Event()
    seen: list[str] = []

    def client() -> None:
        while not stop.is_set():
            seen.append(server.says())

    workers = [threading.Thread(target=client) for _ in range(4)]
    for worker in workers:
        worker.start()
    for version in ("two", "three"):
        server.load(version, version)
        server.admin("/live", name="tiny", prove_seconds=0.1)
        server.change("proved")
    server.load("one", "1")
    server.admin("/live", name="tiny", prove_seconds=60)
    count = len(seen)
    while len(seen) < count + 4:
        time.sleep(0.005)
    server.admin("/rollback", name="tiny")
    stop.set()
    for worker in workers:
        worker.join(10)
    assert set(seen) == {"I am one.", "I am two.", "I am three."}


def test_the_key_is_made_once_and_for_one_user(tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "operator.key"
    keys = operator_key.of_server(path, [tmp_path])
    assert keys is not None and path.stat().st_mode & 0o777 == 0o600
    key = operator_key.read(path)
    assert keys.admit(f"Bearer {key}") and operator_key.of_server(path, [tmp_path]) and operator_key.read(path) == key
    assert operator_key.of_server(None, []) is None
    for arguments, words in (
        ((path, []), "say with --admin-models"),
        ((None, [tmp_path]), "give --admin-key-file"),
        ((path, [tmp_path / "nowhere"]), "which is no directory"),
    ):
        with pytest.raises(RequestError, match=words):
            operator_key.of_server(*arguments)
    for text in ("short\n", f"{key}\n{key}\n", ""):
        path.write_text(text)
        with pytest.raises(RequestError, match="must hold one key"):
            operator_key.read(path)
