"""Several engines behind one name: who gets a prompt, and what happens when an engine breaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepwright_core.engine import SamplingParams
from deepwright_core.errors import RequestError
from deepwright_core.model.transformer import Transformer
from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.affinity import Affinity
from deepwright_serve.limits import Limits
from deepwright_serve.loading import Loading
from deepwright_serve.pool import EnginePool
from deepwright_serve.refusal import Refusal
from deepwright_serve.roster import Roster, Served
from deepwright_serve.scheduling import EngineThread, Ticket
from deepwright_serve.service import Service

from .conftest import ScriptedEngine

END = 7


class Client:
    """Submits prompts and keeps what came back."""

    def __init__(self, pool: EnginePool) -> None:
        self.pool = pool
        self.heard: list[Any] = []

    def ask(self, prompt: list[int], tenant: str = "", answers: int = 1) -> list[Ticket]:
        tickets = [Ticket(prompt, SamplingParams(), self.heard.append, tenant) for _ in range(answers)]
        self.pool.submit(tickets)
        return tickets

    async def until_idle(self) -> None:
        async with asyncio.timeout(10):
            while self.pool.open:
                await asyncio.sleep(0.002)


def pool_of(replicas: int, **limits: Any) -> tuple[EnginePool, list[ScriptedEngine]]:
    engines = [ScriptedEngine(lambda prompt: [1, 2, 3], END) for _ in range(replicas)]
    return EnginePool([EngineThread(engine, Limits(**limits)) for engine in engines]), engines


def told(story: Callable[[Client, list[ScriptedEngine]], Awaitable[None]], replicas: int = 3, **limits: Any) -> None:
    async def whole() -> None:
        pool, engines = pool_of(replicas, **limits)
        pool.start()
        try:
            await story(Client(pool), engines)
        finally:
            for engine in engines:
                engine.gate.set()
            await pool.stop()

    asyncio.run(whole())


def taken(engines: list[ScriptedEngine]) -> list[int]:
    return [len(engine.asked) for engine in engines]


def test_new_prompts_go_to_the_least_loaded_and_known_beginnings_where_they_are_cached() -> None:
    async def story(client: Client, engines: list[ScriptedEngine]) -> None:
        for engine in engines:
            engine.gate.clear()
        trunks = [[number] * 200 for number in range(3)]
        for trunk in trunks:
            client.ask(trunk)
        for engine in engines:
            engine.gate.set()
        await client.until_idle()
        assert taken(engines) == [1, 1, 1]
        homes = {engine.asked[0][0][0]: number for number, engine in enumerate(engines)}
        for trunk in reversed(trunks):
            client.ask([*trunk, 5, 6])
            await client.until_idle()
            assert engines[homes[trunk[0]]].asked[-1][0] == [*trunk, 5, 6]
        # Another tenant shares no cache, so nothing is known of its prompt: the first of equals takes it.
        client.ask(trunks[2], tenant="another")
        await client.until_idle()
        assert engines[0].asked[-1][2] == "another"
        assert client.pool.answered == 7 and client.pool.failed == 0

    told(story)


def test_a_much_busier_replica_is_passed_over() -> None:
    async def story(client: Client, engines: list[ScriptedEngine]) -> None:
        for engine in engines:
            engine.gate.clear()
        trunk = [9] * 100
        for _ in range(12):
            client.ask(trunk)
        loads = [replica.open for replica in client.pool.replicas]
        assert max(loads) <= 9 and min(loads) >= 3, loads
        await asyncio.sleep(0)

    told(story, replicas=2)


def test_answers_to_one_prompt_stay_together_while_they_fit() -> None:
    async def story(client: Client, engines: list[ScriptedEngine]) -> None:
        for engine in engines:
            engine.gate.clear()
        client.ask([1, 2], answers=4)
        assert sorted(replica.open for replica in client.pool.replicas) == [0, 4]
        # Six more fit into no single replica, and into both together.
        client.ask([3, 4], answers=6)
        assert [replica.open for replica in client.pool.replicas] == [5, 5]
        with pytest.raises(Refusal, match="places are taken") as full:
            client.ask([5], answers=1)
        assert full.value.status == 429
        assert client.pool.open == client.pool.capacity == 10

    told(story, replicas=2, running=5, waiting=0)


def test_a_broken_replica_is_taken_out_and_its_requests_are_told() -> None:
    async def story(client: Client, engines: list[ScriptedEngine]) -> None:
        pool = client.pool
        for engine in engines:
            engine.gate.clear()
        for number in range(4):
            client.ask([number])
        engines[0].fail = 3
        engines[0].gate.set()
        async with asyncio.timeout(10):
            while pool.replicas[0].broken is None:
                if pool.replicas[0].open == 0:
                    pool.replicas[0].submit([Ticket([1], SamplingParams(), client.heard.append)])
                await asyncio.sleep(0.002)
        engines[1].gate.set()
        await client.until_idle()
        refusals = [item for item in client.heard if isinstance(item, Refusal)]
        assert len(refusals) >= 3 and "on fire" in refusals[0].message
        assert pool.broken is None and pool.working == [1]
        before = len(engines[0].asked)
        client.ask([0])
        client.ask([1])
        await client.until_idle()
        assert len(engines[0].asked) == before
        assert pool.capacity == pool.replicas[1].capacity
        pool.replicas[1].broken = "gone too"
        assert pool.broken == f"replica 0: {pool.replicas[0].broken}; replica 1: gone too"
        with pytest.raises(Refusal, match="gone too"):
            client.ask([2])

    told(story, replicas=2)


def test_cancelling_reaches_the_replica_that_has_the_ticket() -> None:
    async def story(client: Client, engines: list[ScriptedEngine]) -> None:
        for engine in engines:
            engine.gate.clear()
        tickets = [client.ask([number])[0] for number in range(3)]
        await asyncio.sleep(0.05)
        for ticket in tickets:
            client.pool.cancel(ticket)
        await client.until_idle()
        assert [len(engine.cancelled) for engine in engines] == [1, 1, 1] and not client.heard

    told(story)


def test_health_asks_every_engine_that_is_left(tokenizer: Tokenizer, serve_service: Callable[[Service], Any]) -> None:
    pool, engines = pool_of(2)
    service = Service(Roster([Served("tiny", pool, tokenizer, 256)]), Limits(health_seconds=0.3))
    with serve_service(service) as server:
        server.client.get("/health").raise_for_status()
        assert taken(engines) == [1, 1]
        text = server.client.get("/metrics").text
        assert 'vllm:num_requests_running{engine="1",model_name="tiny"}' in text
        engines[1].gate.clear()
        for replica in pool.replicas:
            replica.last_token_at = 0.0
        assert server.client.get("/health").status_code == 503
        assert server.client.get("/ready").status_code == 200
        pool.replicas[1].broken = "stuck"
        server.client.get("/health").raise_for_status()
        server.client.get("/ready").raise_for_status()
        pool.replicas[0].broken = "stuck"
        for path in ("/health", "/ready"):
            reply = server.client.get(path)
            assert reply.status_code == 503 and "replica 1: stuck" in reply.json()["error"]["message"]
        for replica in pool.replicas:
            replica.broken = None


def test_on_a_cpu_the_weights_are_there_once(model_directory: Path) -> None:
    served = Loading(device="cpu", cache_tokens=256, replicas=3).load(model_directory, "tiny")
    assert isinstance(served.thread, EnginePool)
    models = [replica._engine.model for replica in served.thread.replicas]  # type: ignore[attr-defined]
    assert len({id(model) for model in models}) == 3
    first, *others = [[t.data_ptr() for t in (*model.parameters(), *model.buffers())] for model in models]
    assert all(other == first for other in others)
    prompt = list(range(20))
    answers = [
        replica._engine.generate([prompt], SamplingParams(max_tokens=8, temperature=0))[0].token_ids  # type: ignore[attr-defined]
        for replica in served.thread.replicas
    ]
    assert answers[0] == answers[1] == answers[2]


def test_a_model_without_a_batch_invariant_form_is_refused_at_the_start(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Loading(device="cpu", cache_tokens=256, batch_invariant=True).load(model_directory, "tiny")
    monkeypatch.setattr(Transformer, "logits", lambda self, hidden: torch.einsum("bd,vd->bv", hidden, self.head.weight))
    with pytest.raises(RequestError, match="--batch-invariant cannot be had for this model: torch's einsum was called"):
        Loading(device="cpu", cache_tokens=256, batch_invariant=True).load(model_directory, "tiny")


def test_more_replicas_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RequestError, match="--replicas is 3 and each wants a GPU of its own; this machine has 2"):
        Loading(replicas=3).place()
    with pytest.raises(RequestError, match="a GPU each from cuda:0"):
        Loading(device="cuda:1", replicas=2).place()
    assert Loading(replicas=2).place()[0] == torch.device("cuda", 0)


def test_the_longest_known_beginning_decides_and_old_marks_are_forgotten() -> None:
    affinity = Affinity(most=4)
    assert affinity.find("", [1] * 300) is None
    affinity.remember("", [1] * 300, 0)  # marks at 64, 128 and 256
    affinity.remember("", [1] * 100, 1)  # the mark at 64 is now another's
    assert affinity.find("", [1] * 120) == 1 and affinity.find("", [1] * 280) == 0
    assert affinity.find("other", [1] * 280) is None and affinity.find("", [1] * 63) is None
    affinity.remember("", [2] * 300, 2)
    assert affinity.find("", [1] * 280) in (0, 1) and affinity.find("", [2] * 300) == 2
