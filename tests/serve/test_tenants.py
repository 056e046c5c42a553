"""Keys with limits, and tenants that must not be able to hurt each other."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepwright_core import plugins
from deepwright_core.engine import Engine, SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.model.directory import load_model
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.keys import Keys
from deepwright_serve.limits import Limits
from deepwright_serve.refusal import Refusal
from deepwright_serve.roster import Roster, Served
from deepwright_serve.scheduling import EngineThread, Ticket
from deepwright_serve.service import Service
from deepwright_serve.tenants import Allowance, Bucket, Tenant
from deepwright_serve.waiting import FairQueue

KEY, OTHER = "a-key-that-is-long-enough", "another-key-long-enough"


class Clock:
    """Time that stands still until it is told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


# The key file ---------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str) -> Keys:
    path = tmp_path / "keys"
    path.write_text(text)
    return Keys.read(path)


def test_a_line_is_a_key_and_what_is_known_of_its_holder(tmp_path: Path) -> None:
    keys = read(
        tmp_path,
        f"# staff\n{KEY}  name=alice requests-per-minute=60\ttokens-per-minute=1000 concurrent=4\n\n  {OTHER}  \n",
    )
    alice, other = keys.admit(f"Bearer {KEY}"), keys.admit(f"bearer {OTHER}")
    assert alice is not None and other is not None
    assert (alice.name, alice.allowance) == ("alice", Allowance(60, 1000, 4))
    assert other.name.startswith("key-") and other.allowance == Allowance() and OTHER not in other.name
    assert alice.salt != other.salt and keys.admit(f"Bearer {KEY}x") is None and keys.admit(f"Basic {KEY}") is None


def test_everything_wrong_in_a_key_file_is_told_at_once_and_no_key_with_it(tmp_path: Path) -> None:
    text = "\n".join(
        [
            f"{KEY} name=alice concurent=3",
            f"{OTHER} name=alice",
            f"{KEY} requests-per-minute=0",
            "a-third-key-long-enough tokens-per-minute=1e3 name=a/b",
            f"a-fourth-key-long-enough {OTHER}",
            "short",
        ]
    )
    with pytest.raises(RequestError) as wrong:
        read(tmp_path, text)
    problems = wrong.value.problems
    expected = [
        (1, "Did you mean concurrent?"),
        (2, "stands in line 1 already"),
        (3, "expected a whole number"),
        (3, "the key stands in line 1"),
        (4, "tokens-per-minute is '1e3'"),
        (4, "name is 'a/b'"),
        (5, "no option"),
        (6, "fewer than"),
    ]
    for (number, words), problem in zip(expected, problems, strict=True):
        assert f"line {number}:" in problem and words in problem
    assert KEY not in str(wrong.value) and OTHER not in str(wrong.value)


def test_reloading_keeps_what_runs_and_refuses_a_wrong_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = read(tmp_path, f"{KEY} name=alice requests-per-minute=2\n")
    alice = keys.admit(f"Bearer {KEY}")
    assert alice is not None
    alice.enter(1, 5)
    alice.knock()
    path.write_text(f"{KEY} name=alice requests-per-minute=2\n{OTHER}\n")
    keys.reload()
    assert keys.admit(f"Bearer {KEY}") is alice and alice.open == 1
    assert alice.headers()["x-ratelimit-remaining-requests"] == "1"
    path.write_text("short\n")
    with pytest.raises(RequestError):
        keys.reload()
    assert keys.admit(f"Bearer {OTHER}") is not None
    path.write_text(f"{OTHER}\n")
    keys.reload()
    assert keys.admit(f"Bearer {KEY}") is None


# Rates ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 600), st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), max_size=30))
def test_a_bucket_never_gives_more_than_its_rate(per_minute: int, wishes: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    spent = 0
    for wait, amount in wishes:
        clock.now += wait
        if bucket.level >= amount:
            bucket.spend(amount)
            spent += amount
        assert bucket.level <= per_minute
    assert spent <= per_minute + (clock.now - Clock.now) * per_minute / 60 + 1e-6


def test_tokens_may_be_overdrawn_and_are_waited_for() -> None:
    clock = Clock()
    tenant = Tenant("alice", "salt", Allowance(tokens_per_minute=60), clock)
    tenant.enter(1, 20)
    tenant.use(100)
    tenant.leave(1)
    with pytest.raises(Refusal) as refused:
        tenant.enter(1, 1)
    assert refused.value.status == 429 and refused.value.headers["Retry-After"] == "61"
    assert tenant.headers() == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "2m0s",
    }
    clock.now += 61
    tenant.enter(1, 1)


def test_requests_a_minute_over_http(serve_keys: Callable[..., Any]) -> None:
    server = serve_keys(f"{KEY} requests-per-minute=3\n{OTHER}\n")
    server.client.headers["authorization"] = f"Bearer {KEY}"
    left = [server.chat().headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    refused = server.chat()
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    # The probes cost nothing, and others have limits of their own.
    assert server.client.get("/ready").status_code == 200
    server.client.headers["authorization"] = f"Bearer {OTHER}"
    assert server.chat().status_code == 200 and "x-ratelimit-limit-requests" not in server.chat().headers


def test_answers_at_the_same_time_over_http(serve_keys: Callable[..., Any]) -> None:
    server = serve_keys(f"{KEY} concurrent=2\n{OTHER}\n")
    server.client.headers["authorization"] = f"Bearer {KEY}"
    assert server.chat(n=3).status_code == 400
    server.engine.gate.clear()
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.append(server.chat(n=2).status_code))
    thread.start()
    until(lambda: server.served.thread.open == 2)
    for stream in (False, True):
        refused = server.chat(stream=stream)
        assert refused.status_code == 429 and refused.headers["retry-after"]
    server.engine.gate.set()
    thread.join(10)
    assert done == [200] and server.chat(n=2).status_code == 200


# The queue ------------------------------------------------------------------------------------------


class Waiting:
    """Somebody in the queue."""

    def __init__(self, tenant: str, number: int, give_up: float = float("inf")) -> None:
        self.tenant, self.number, self.give_up = tenant, number, give_up


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_the_queue_is_fair_between_tenants_and_orderly_within(moves: list[tuple[str, bool]]) -> None:
    queue: FairQueue[Waiting] = FairQueue()
    lines: dict[str, list[Waiting]] = {}
    for number, (tenant, leaves) in enumerate(moves):
        if leaves and lines.get(tenant):
            gone = lines[tenant].pop(len(lines[tenant]) // 2)
            assert queue.remove(gone) and not queue.remove(gone)
        else:
            item = Waiting(tenant, number)
            lines.setdefault(tenant, []).append(item)
            queue.push(item)
        assert len(queue) == len(list(queue)) == sum(map(len, lines.values()))
    order = [queue.pop() for _ in range(len(queue))]
    for tenant, line in lines.items():
        assert [item for item in order if item.tenant == tenant] == line
    # Nobody gets a second turn while another who waits has not had a first one.
    for place, item in enumerate(order):
        before = [other.tenant for other in order[:place]]
        for tenant, line in lines.items():
            if before.count(tenant) < len(line):
                assert before.count(item.tenant) <= before.count(tenant) + 1


def test_those_who_waited_too_long_are_taken_out() -> None:
    queue: FairQueue[Waiting] = FairQueue()
    items = [Waiting("ab"[number % 2], number, give_up=number) for number in range(6)]
    for item in items:
        queue.push(item)
    assert sorted(item.number for item in queue.late(2.5)) == [0, 1, 2]
    assert [queue.pop().number for _ in range(3)] == [4, 3, 5] or len(queue) == 0


def test_a_greedy_tenant_does_not_keep_others_waiting(serve_keys: Callable[..., Any]) -> None:
    server = serve_keys(f"{KEY} name=greedy\n{OTHER} name=modest\n", answer="hello", running=2, waiting=100)
    thread: EngineThread = server.served.thread
    order: list[str] = []

    def ticket(name: str) -> Ticket:
        def sink(item: Any) -> None:
            if item.finish_reason is not None:
                order.append(name)

        return Ticket([1, 2, 3], SamplingParams(max_tokens=2), sink, tenant=name)

    async def ask() -> None:
        thread.submit([ticket("greedy") for _ in range(50)])
        thread.submit([ticket("modest") for _ in range(3)])

    server.engine.gate.clear()
    asyncio.run_coroutine_threadsafe(ask(), thread._loop).result(10)
    until(lambda: len(server.engine.running) == 2)
    server.engine.gate.set()
    until(lambda: len(order) == 53)
    # They take turns, whoever came first.
    assert order[:9].count("modest") == 3


def test_waiting_too_long_for_a_turn_is_a_503(serve_keys: Callable[..., Any]) -> None:
    server = serve_keys(f"{KEY}\n", running=1, waiting=4, queue_seconds=0.2)
    server.client.headers["authorization"] = f"Bearer {KEY}"
    server.engine.gate.clear()
    thread = threading.Thread(target=server.chat)
    thread.start()
    until(lambda: len(server.engine.running) == 1)
    late = server.chat()
    assert late.status_code == 503 and late.json()["error"]["code"] == "queue_timeout"
    assert late.headers["retry-after"]
    server.engine.gate.set()
    thread.join(10)
    server.until_idle()


# What one tenant could learn of another -------------------------------------------------------------


def test_tenants_never_see_each_others_cached_prefixes(
    model_directory: Path, tokenizer: Tokenizer, serve_service: Callable[[Service], Any]
) -> None:
    """Neither in the count of cached tokens nor in the work that the engine does for the prompt."""
    engine = Engine(load_model(model_directory, plugins.installed().registry), tokenizer.end_ids, cache_tokens=4096)
    limits = Limits()
    served = Served("tiny", EngineThread(engine, limits), tokenizer, 2048)
    service = Service(Roster([served]), limits, Keys([KEY, OTHER]))
    prompt = list(itertools.islice(itertools.cycle(range(5, 200)), 1200))
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 1}

    with serve_service(service) as server:

        def ask(key: str) -> tuple[int, int]:
            before = engine.stats.cached_prompt_tokens
            reply = server.client.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}).json()
            return reply["usage"]["prompt_cache_hit_tokens"], engine.stats.cached_prompt_tokens - before

        asked = [ask(KEY), ask(OTHER), ask(KEY), ask(OTHER)]
        assert asked[:2] == [(0, 0), (0, 0)], "the second tenant saw the first one's prompt"
        assert all(told == cached > 1000 for told, cached in asked[2:])


# Beside the tests -----------------------------------------------------------------------------------


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def serve_keys(serve_script: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Serve a scripted engine behind a key file."""

    def start(text: str, **options: Any) -> Any:
        path = tmp_path / "keys"
        path.write_text(text)
        return serve_script(keys=Keys.read(path), **options)

    return start
