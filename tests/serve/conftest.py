"""A tiny model directory, an engine that says what it is told to say, and servers on free loopback ports."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import uvicorn

from deepwright_core import plugins
from deepwright_core.engine import EngineStats, SamplingParams, TokenEvent, TokenScore
from deepwright_core.errors import RequestError
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.tokenizer import Tokenizer
from deepwright_core.tokenizer.bpe import BpeConfig, train
from deepwright_serve.command import listen, uvicorn_config
from deepwright_serve.keys import Keys
from deepwright_serve.limits import Limits
from deepwright_serve.roster import Roster, Served
from deepwright_serve.scheduling import EngineLike, EngineThread
from deepwright_serve.service import Service

# uvicorn asks itself ten times a second whether it shall end, and then waits a tenth of a second more. Hundreds of
# servers end in these tests, and nothing else could use that time.
uvicorn.server.asyncio = SimpleNamespace(**{**vars(asyncio), "sleep": lambda seconds: asyncio.sleep(seconds / 10)})

WORDS = ["What is 17 + 25? The answer is 42.", "def add(a, b):\n    return a + b\n", "Ein Käse für Zoë, 你好 🙂"]


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """The command sends the log to the standard error of the moment, which a test's capture closes afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train(BpeConfig(vocab_size=320, min_frequency=2), WORDS * 4)


@pytest.fixture(scope="session")
def model_directory(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers: it says nonsense, but it says it deterministically."""
    directory = tmp_path_factory.mktemp("served") / "model"
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        layers=2,
        intermediate_size=64,
        max_positions=65536,
        init_std=0.3,
        attention={"name": "gqa", "heads": 2, "kv_heads": 1, "head_dim": 16},
        ffn={"name": "dense"},
    )
    torch.manual_seed(0)
    save_model(build_model(plugins.installed().registry, config), directory)
    tokenizer.save(directory)
    return directory


class ScriptedEngine:
    """Answers every prompt with `script(prompt)`, one token a step, and keeps a record of what it was asked.

    `gate` holds up the steps while it is cleared. `fail` makes the next steps raise. Scores are made up: a token's is
    -0.5, and the alternatives after it are the ids from 100 upwards, each half as probable as the one before.
    """

    def __init__(self, script: Callable[[list[int]], list[int]], eos_id: int) -> None:
        self.script = script
        self.eos_id = eos_id
        self.gate = threading.Event()
        self.gate.set()
        self.fail = 0
        self.asked: list[tuple[list[int], SamplingParams, str]] = []
        self.cancelled: list[int] = []
        self.running: dict[int, list[int]] = {}
        self._left: dict[int, int] = {}
        self._begun: set[int] = set()

    def add(self, prompt_ids: list[int], params: SamplingParams, *, salt: str = "", adapter: str = "") -> int:
        if 777_777 in prompt_ids:
            raise RequestError("The prompt holds token 777777.")
        number = len(self.asked)
        self.asked.append((prompt_ids, params, salt))
        self.running[number] = [*self.script(prompt_ids), self.eos_id]
        self._left[number] = params.max_tokens
        return number

    def cancel(self, request_id: int) -> bool:
        self.cancelled.append(request_id)
        return self.running.pop(request_id, None) is not None

    @property
    def has_work(self) -> bool:
        return bool(self.running)

    @property
    def stats(self) -> EngineStats:
        nothing: dict[str, Any] = dict.fromkeys((field.name for field in fields(EngineStats)), 0)
        return EngineStats(**(nothing | {"running": len(self.running), "cache_blocks_total": 8, "accepted_at": ()}))

    def step(self) -> list[TokenEvent]:
        self.gate.wait(0.05)
        if not self.gate.is_set():
            return []
        if self.fail:
            self.fail -= 1
            raise RuntimeError("The accelerator is on fire.")
        events = []
        for number, tokens in list(self.running.items()):
            token = tokens.pop(0)
            self._left[number] -= 1
            reason: Any = "stop" if token == self.eos_id else "length" if self._left[number] == 0 else None
            if reason:
                del self.running[number]
            events.append(TokenEvent(number, token, -0.5, reason, cached_tokens=1, **self._scores(number, token)))
        time.sleep(0.0005)
        return events

    def _scores(self, number: int, token: int) -> dict[str, Any]:
        prompt, params, _ = self.asked[number]

        def score(token: int, count: int) -> TokenScore:
            others = [(100 + n, -0.5 - n * math.log(2)) for n in range(count)]
            return TokenScore(token, -0.5, ((token, -0.5), *others[1:]) if count else ())

        first = number not in self._begun
        self._begun.add(number)
        scores: dict[str, Any] = {}
        if params.scores is not None:
            scores["score"] = score(token, params.scores)
        if params.prompt_scores is not None and first:
            scores["prompt_scores"] = tuple(score(given, params.prompt_scores) for given in prompt[1:])
        return scores


def service_of(
    engine: EngineLike, tokenizer: Tokenizer, context: int = 256, limits: Limits | None = None, keys: Keys | None = None
) -> Service:
    """A service with one model, `tiny`."""
    limits = limits or Limits()
    served = Served("tiny", EngineThread(engine, limits), tokenizer, context)
    return Service(Roster([served]), limits, keys)


class Running:
    """A service that is being served, and a client for it. `served` and `engine` are its first model's."""

    def __init__(self, service: Service, address: str) -> None:
        self.service = service
        self.served = service.roster.models()[0]
        self.engine: Any = engine_of(service)
        self.address = address
        self.client = httpx.Client(base_url=address, timeout=20, trust_env=False)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def until_idle(self) -> None:
        """Wait until nothing runs any more; fails if that does not happen."""
        deadline = time.monotonic() + 10
        while self.served.thread.open or self.engine.has_work:
            assert time.monotonic() < deadline, "work was left in the engine"
            time.sleep(0.005)


def engine_of(service: Service) -> Any:
    """The (first) engine behind the first model."""
    return service.roster.models()[0].thread.replicas[0]._engine


@contextmanager
def running(service: Service) -> Iterator[Running]:
    """Serve on a free port from a thread of this process."""
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn_config(service))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    try:
        served = Running(service, f"http://127.0.0.1:{listener.getsockname()[1]}")
        with served.client:
            yield served
    finally:
        engine = engine_of(service)
        if hasattr(engine, "gate"):
            engine.gate.set()
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive(), "the server did not end"


@pytest.fixture
def serve_script(tokenizer: Tokenizer) -> Iterator[Callable[..., Running]]:
    """Serve an engine that answers with the given text; <think> and </think> in it are the real tokens."""
    with ExitStack() as stack:

        def start(answer: str = "Hello, Zoë!", *, keys: list[str] | Keys | None = None, **limits: Any) -> Running:
            engine = ScriptedEngine(lambda prompt: tokenizer.encode(answer, allow_special=True), tokenizer.eos_id)
            keys = Keys(keys) if isinstance(keys, list) else keys
            service = service_of(engine, tokenizer, limits=Limits(**limits), keys=keys)
            return stack.enter_context(running(service))

        yield start


@pytest.fixture
def serve_service() -> Callable[[Service], Any]:
    return running


@pytest.fixture(scope="module")
def scripted(tokenizer: Tokenizer) -> Iterator[Callable[[str], Running]]:
    """One server for a whole module: give it its answer, get it with a clean record of what it was asked."""
    engine = ScriptedEngine(lambda prompt: [], tokenizer.eos_id)
    with running(service_of(engine, tokenizer, context=512)) as server:

        def answering(answer: str) -> Running:
            server.until_idle()
            engine.script = lambda prompt: tokenizer.encode(answer, allow_special=True)
            engine.asked.clear()
            engine.cancelled.clear()
            engine._begun.clear()
            return server

        yield answering
