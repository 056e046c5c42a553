"""Requests that end before their answer: hang-ups, deadlines, full queues, failing steps. Nothing may stay behind."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from deepwright_core import plugins
from deepwright_core.engine import Engine
from deepwright_core.model.directory import load_model
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.limits import Limits
from deepwright_serve.service import Service

from .conftest import service_of

LONG = "on and on " * 20


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_cancels(serve_script: Callable[..., Any], stream: bool) -> None:
    server = serve_script(LONG)
    server.engine.gate.clear()

    async def hang_up() -> None:
        async with httpx.AsyncClient(base_url=server.address, trust_env=False) as client:
            task = asyncio.create_task(client.post("/v1/chat/completions", json=body(n=3, stream=stream)))
            while len(server.engine.running) < 3:
                await asyncio.sleep(0.005)
            task.cancel()

    asyncio.run(hang_up())
    # The engine never generated a token, so only the hang-up can have ended them.
    server.until_idle()
    assert sorted(server.engine.cancelled) == [0, 1, 2]


def test_a_full_queue_is_429_and_room_comes_back(serve_script: Callable[..., Any]) -> None:
    server = serve_script(running=2, waiting=1)
    server.engine.gate.clear()
    replies: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda: replies.append(server.chat())) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: server.served.thread.open == 3)
    for stream in (False, True):
        refused = server.chat(stream=stream)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "rate_limit_error"
    assert server.client.get("/ready").status_code == 503
    server.engine.gate.set()
    for thread in threads:
        thread.join(10)
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert server.chat().status_code == 200 and server.client.get("/ready").status_code == 200
    # All or nothing: what could never fit is told at once.
    assert server.chat(n=4).status_code == 400


def test_a_deadline_ends_the_work(serve_script: Callable[..., Any]) -> None:
    server = serve_script(LONG, request_seconds=0.2)
    server.engine.gate.clear()
    late = server.chat()
    assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
    server.until_idle()
    events = server.chat(stream=True).text.split("\n\n")
    assert "deadline_exceeded" in events[-3] and events[-2] == "data: [DONE]"
    server.until_idle()


def test_health_wants_a_token(serve_script: Callable[..., Any]) -> None:
    server = serve_script(health_seconds=0.2)
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.engine.asked[0][1].max_tokens == 1
    server.engine.gate.clear()
    server.served.thread.last_token_at = -1e9
    stuck = server.client.get("/health")
    assert stuck.status_code == 503 and stuck.json()["error"]["code"] == "engine_stuck"
    server.until_idle()


def test_a_failed_step_fails_its_requests_and_no_others(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    server.engine.fail = 1
    failed = server.chat()
    assert failed.status_code == 500 and failed.json()["error"]["message"].endswith("is on fire.")
    assert server.chat().status_code == 200
    server.engine.fail = 1
    assert "on fire" in server.chat(stream=True).text
    server.until_idle()


def test_an_engine_that_keeps_failing_is_given_up(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    server.engine.fail = 10**6
    assert [server.chat().status_code for _ in range(4)] == [500, 500, 503, 503]
    for path in ("/health", "/ready"):
        assert server.client.get(path).status_code == 503
    assert server.served.thread.open == 0


def test_what_the_engine_refuses_is_a_400(serve_script: Callable[..., Any]) -> None:
    server = serve_script()
    server.served.tokenizer = _WithToken(server.served.tokenizer)
    refused = server.client.post("/v1/completions", json={"model": "tiny", "prompt": [777_777]})
    assert refused.status_code == 400 and "777777" in refused.json()["error"]["message"]
    server.until_idle()


class _WithToken:
    """The tokenizer with a larger vocabulary."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = 1_000_000

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


async def hang_up_or_read(address: str, fields: dict[str, Any], patience: float | None) -> str:
    """One request over a connection of its own, cut off after `patience` seconds: its status, or "hung up"."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        text = json.dumps(fields)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
        async with asyncio.timeout(patience):
            reply = await reader.read(-1)
        assert not fields["stream"] or b"data: [DONE]" in reply or b" 200 " not in reply[:20]
        return reply.split(b" ", 2)[1].decode()
    except TimeoutError:
        return "hung up"
    finally:
        writer.transport.abort()


@pytest.mark.costly
def test_a_crowd_of_which_half_hangs_up_leaves_nothing(
    model_directory: Any, tokenizer: Tokenizer, serve_service: Callable[[Service], Any]
) -> None:
    """DEEPWRIGHT_STREAMS=500 makes the crowd larger."""
    crowd = int(os.environ.get("DEEPWRIGHT_STREAMS", "200"))
    model = load_model(model_directory, plugins.installed().registry)
    engine = Engine(model, tokenizer.eos_id, cache_tokens=400, block_size=4, max_batch=16)
    service = service_of(engine, tokenizer, limits=Limits(running=16, waiting=2 * crowd))
    dice = random.Random(5)

    async def all_at_once(address: str) -> list[str]:
        requests = []
        for number in range(crowd):
            fields = body(
                stream=number % 4 != 0, max_tokens=dice.randint(1, 60), seed=number, n=1 + number % 2, ignore_eos=True
            )
            patience = None if number % 2 else dice.uniform(0.001, crowd / 100)
            requests.append(hang_up_or_read(address, fields, patience))
        return await asyncio.gather(*requests)

    with serve_service(service) as server:
        outcomes = asyncio.run(all_at_once(server.address))
        server.until_idle()
        assert outcomes.count("hung up") > crowd / 10 and set(outcomes) == {"200", "hung up"}
        stats = server.served.thread.stats
        assert (stats.running, stats.waiting, stats.cache_blocks_used) == (0, 0, 0)
        assert stats.preemptions > 0, "the cache was never too small: this tests less than it should"
        # The whole cache can be given to new requests, and what is in it is right.
        again = server.client.post("/v1/chat/completions", json=body(max_tokens=200, n=4))
        assert again.status_code == 200
        greedy = [server.chat(temperature=0, max_tokens=30).json()["choices"][0]["message"] for _ in range(2)]
        assert greedy[0] == greedy[1]
