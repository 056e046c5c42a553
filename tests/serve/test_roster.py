"""Several models behind one address, and one name that changes hands while clients are being answered."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from deepwright_core.tokenizer import Tokenizer
from deepwright_serve.limits import Limits
from deepwright_serve.loading import Loading
from deepwright_serve.refusal import Refusal
from deepwright_serve.roster import Roster, Served
from deepwright_serve.scheduling import EngineThread
from deepwright_serve.service import Service

from .conftest import Running, ScriptedEngine


def model(tokenizer: Tokenizer, says: str, name: str = "tiny", version: str = "") -> Served:
    engine = ScriptedEngine(lambda prompt: tokenizer.encode(says), tokenizer.eos_id)
    return Served(name, EngineThread(engine, Limits()), tokenizer, 256, version)


def on_loop(server: Running, work: Callable[[], Any]) -> Any:
    """The result of a coroutine function on the server's event loop."""
    loop = server.served.thread._loop
    assert loop is not None
    return asyncio.run_coroutine_threadsafe(work(), loop).result(20)


def test_each_name_is_answered_by_its_model(tokenizer: Tokenizer, serve_service: Callable[[Service], Any]) -> None:
    service = Service(Roster([model(tokenizer, "red"), model(tokenizer, "blue", "other/blue")]), Limits())
    with serve_service(service) as server:
        assert [card["id"] for card in server.client.get("/v1/models").json()["data"]] == ["tiny", "other/blue"]
        assert server.client.get("/v1/models/other/blue").json()["id"] == "other/blue"
        for name, word in (("tiny", "red"), ("other/blue", "blue")):
            reply = server.chat(model=name).json()
            assert reply["model"] == name and reply["choices"][0]["message"]["content"] == word
        unknown = server.chat(model="green")
        assert unknown.status_code == 404 and "'tiny', 'other/blue'" in unknown.json()["error"]["message"]
        server.client.get("/health").raise_for_status()
        service.roster.models()[1].thread.broken = "it is on fire"
        assert server.client.get("/ready").status_code == server.client.get("/health").status_code == 503


@pytest.mark.costly
def test_a_name_changes_hands_under_load_and_every_answer_is_whole(
    tokenizer: Tokenizer, serve_service: Callable[[Service], Any]
) -> None:
    texts = [f"version {number} " * 12 for number in range(4)]
    service = Service(Roster([model(tokenizer, texts[0])]), Limits())
    seen: list[str] = []
    stop = threading.Event()

    def client(server: Running) -> None:
        with httpx.Client(base_url=server.address, timeout=20, trust_env=False) as own:
            while not stop.is_set():
                fields = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "stream": True}
                lines = own.post("/v1/chat/completions", json=fields).text.split("\n\n")
                assert lines[-2] == "data: [DONE]", lines
                chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
                assert not any("error" in chunk for chunk in chunks), chunks
                seen.append("".join(c["choices"][0]["delta"].get("content", "") for c in chunks))

    with serve_service(service) as server:
        workers = [threading.Thread(target=client, args=(server,)) for _ in range(5)]
        for worker in workers:
            worker.start()
        engines = []
        for text in texts[1:]:
            answered = len(seen)
            while len(seen) < answered + 8:
                assert all(worker.is_alive() for worker in workers)
                stop.wait(0.005)

            async def swap(text: str = text) -> None:
                old = service.roster.replace(model(tokenizer, text))
                assert old is not None
                engines.append(weakref.ref(old.thread._engine))
                await service.roster.retire(old, limit=10)

            on_loop(server, swap)
        stop.set()
        for worker in workers:
            worker.join(10)
        assert set(seen) == set(texts)
        gc.collect()
        assert len(engines) == 3 and all(engine() is None or engine() is server.engine for engine in engines)
        assert server.chat().json()["choices"][0]["message"]["content"] == texts[-1]


def test_a_lease_keeps_a_model_and_a_limit_ends_the_wait(tokenizer: Tokenizer) -> None:
    async def story() -> None:
        roster = Roster([model(tokenizer, "old")])
        await roster.start()
        with roster.lease("tiny") as old:
            roster.replace(model(tokenizer, "new"))
            ending = asyncio.create_task(roster.retire(old, limit=10))
            await asyncio.sleep(0.1)
            assert not ending.done() and old.thread.broken is None
            assert roster.find("tiny") is not old
        await ending
        # What comes to it now is refused: it has ended.
        with pytest.raises(Refusal):
            old.thread.submit([])
        with roster.lease("tiny") as new:
            roster.replace(model(tokenizer, "newest"))
            await roster.retire(new, limit=0.05)
        await roster.stop()

    asyncio.run(story())


def test_a_thread_ends_with_the_last_of_its_names(tokenizer: Tokenizer) -> None:
    async def story() -> None:
        base = model(tokenizer, "base")
        adapter = Served("tuned", base.thread, tokenizer, 256, adapter="tuned")
        roster = Roster([base, adapter])
        await roster.start()
        assert roster.threads() == [base.thread]
        await roster.retire(roster.remove("tuned"), limit=1)
        assert base.thread.broken is None
        await roster.stop()

    asyncio.run(story())


def test_a_real_models_weights_leave_memory_while_others_still_know_it(
    model_directory: Path, serve_service: Callable[[Service], Any]
) -> None:
    loading = Loading(device="cpu", cache_tokens=1024, limits=Limits(running=4))
    service = Service(Roster([loading.load(model_directory, "tiny", "1")]), loading.limits)
    with serve_service(service) as server:
        before = server.chat(temperature=0, max_tokens=8).json()["choices"]
        weights = weakref.ref(server.engine.model)
        server.engine = None
        after = loading.load(model_directory, "tiny", "2")

        async def swap() -> None:
            before = service.roster.replace(after)
            assert before is server.served
            await service.roster.retire(before, limit=10)

        on_loop(server, swap)
        assert weights() is None and server.served.version == "1"
        server.engine = service.roster.find("tiny").thread._engine
        assert server.chat(temperature=0, max_tokens=8).json()["choices"] == before
