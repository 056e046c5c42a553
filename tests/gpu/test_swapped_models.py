"""A model replaced while it answers, on a GPU: what it has begun is finished, and its memory is free afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from deepwright_core.engine import SamplingParams, TokenEvent
from deepwright_core.model.config import ModelConfig
from deepwright_core.model.directory import save_model
from deepwright_core.model.transformer import build_model
from deepwright_core.plugins import installed
from deepwright_core.tokenizer.bpe import BpeConfig, train
from deepwright_serve.loading import Loading
from deepwright_serve.refusal import Refusal
from deepwright_serve.roster import Roster, Served
from deepwright_serve.scheduling import Ticket

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"),
]

# What libraries keep for the process, beside models; far below one model and its cache.
SLACK = 96 << 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 0.4 GiB of weights and, with 65,536 tokens, 1 GiB of cache."""
    place = tmp_path_factory.mktemp("served") / "model"
    tokenizer = train(BpeConfig(vocab_size=320, min_frequency=2), ["What is 17 + 25? The answer is 42."] * 4)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=2048,
        layers=4,
        intermediate_size=5632,
        max_positions=4096,
        init_std=0.05,
        attention={"name": "gqa", "heads": 16, "kv_heads": 16, "head_dim": 128},
        ffn={"name": "dense"},
    )
    save_model(build_model(installed().registry, config, seed=0).to(torch.bfloat16), place)
    tokenizer.save(place)
    return place


def free() -> int:
    """Bytes of the whole device: the test wants a GPU that nobody else is using."""
    return int(torch.cuda.mem_get_info()[0])


def require_whole(answers: list[list[TokenEvent | Refusal]], length: int) -> None:
    for heard in answers:
        events = [event for event in heard if isinstance(event, TokenEvent)]
        assert len(events) == len(heard) == length and events[-1].finish_reason == "length"


def test_swaps_finish_what_runs_and_give_the_memory_back(directory: Path) -> None:
    loading = Loading()
    needed = loading.bytes_of(directory)

    async def answers(served: Served, count: int, length: int) -> list[list[TokenEvent | Refusal]]:
        heard: list[list[TokenEvent | Refusal]] = [[] for _ in range(count)]
        params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        tickets = [Ticket([1, 2, 3 + row], params, heard[row].append) for row in range(count)]
        served.thread.submit(tickets)
        while not all(ticket.done for ticket in tickets):
            await asyncio.sleep(0.005)
        return heard

    async def story() -> None:
        roster = Roster([loading.load(directory, "tiny", "0")])
        await roster.start()
        with roster.lease("tiny") as first:
            require_whole(await answers(first, 8, 64), 64)
        del first
        over = False

        async def traffic() -> None:
            while not over:
                with roster.lease("tiny") as served:
                    require_whole(await answers(served, 8, 200), 200)

        users = asyncio.create_task(traffic())
        with roster.lease("tiny") as first:  # both at once, as later on: more rows are more graphs
            require_whole(await answers(first, 8, 64), 64)
        del first
        before, allocated = free(), torch.cuda.memory_allocated()
        for version in range(1, 4):
            candidate = await asyncio.to_thread(loading.load, directory, "tiny", str(version))
            assert before - free() > 0.8 * needed
            old = roster.replace(candidate)
            assert old is not None and not users.done()
            await roster.retire(old, limit=60)
            del old, candidate
            with roster.lease("tiny") as now:
                require_whole(await answers(now, 8, 64), 64)
            assert now.version == str(version)
            del now
            assert torch.cuda.memory_allocated() < allocated + SLACK
            # Allocators keep what was freed in pieces, for the next model; more than that would be another model.
            assert free() > before - needed, f"{(before - free()) >> 20} MiB are still held"
        over = True
        await users
        await roster.stop()

    asyncio.run(story())
