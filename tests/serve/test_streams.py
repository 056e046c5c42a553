"""What carries tokens from the engine's thread to the streams: nothing is lost, late or out of order."""

from __future__ import annotations

import asyncio
import threading
import time

from deepwright_serve.arrivals import Arrivals
from deepwright_serve.outbox import LONGEST_REST, Outbox


def test_a_reader_gets_what_came_or_hears_that_nothing_did() -> None:
    async def story() -> None:
        arrivals: Arrivals[int] = Arrivals()
        arrivals.put(1)
        arrivals.put(2)
        assert await arrivals.take(beat=60) == [1, 2]
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, arrivals.put, 3)
        assert await arrivals.take(beat=60) == [3]
        quiet: Arrivals[int] = Arrivals()
        loop.call_later(0.03, quiet.put, 4)
        assert await quiet.take(beat=0.05) == [4]
        # The timer of the wait before is still on its way: it must not end this one early.
        began = loop.time()
        assert await quiet.take(beat=0.05) == []
        assert loop.time() - began >= 0.05
        assert await quiet.take(beat=0.05) == []
        arrivals.close()
        quiet.close()

    asyncio.run(story())


def test_a_reader_that_leaves_while_it_waits_loses_nothing() -> None:
    async def story() -> None:
        arrivals: Arrivals[int] = Arrivals()
        waiting = asyncio.ensure_future(arrivals.take())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        arrivals.put(1)
        assert await arrivals.take() == [1]

    asyncio.run(story())


def test_the_loop_rests_after_a_delivery_that_kept_it_busy() -> None:
    deliveries: list[list[int]] = []
    all_there = threading.Event()

    def deliver(items: list[int]) -> None:
        deliveries.append(items)
        time.sleep(LONGEST_REST)
        if sum(map(len, deliveries)) == 200:
            all_there.set()

    async def story() -> None:
        outbox: Outbox[int] = Outbox(deliver)
        outbox.open()

        def engine() -> None:
            for number in range(200):
                outbox.post([number])
                time.sleep(0.0005)

        thread = threading.Thread(target=engine)
        thread.start()
        async with asyncio.timeout(30):
            await asyncio.to_thread(all_there.wait)
        thread.join()
        # Nobody must be left waiting: the next one comes without another to push it.
        outbox.post([200])
        async with asyncio.timeout(30):
            while deliveries[-1][-1] != 200:
                await asyncio.sleep(0.001)

    asyncio.run(story())
    assert [item for items in deliveries for item in items] == list(range(201))
    assert len(deliveries) < 100


def test_a_delivery_that_fails_does_not_stop_the_next() -> None:
    delivered: list[int] = []

    def deliver(items: list[int]) -> None:
        if items == [0]:
            raise ValueError("the sink of one stream")
        delivered.extend(items)

    async def story() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        outbox: Outbox[int] = Outbox(deliver)
        outbox.open()
        outbox.post([0])
        await asyncio.sleep(0.01)
        outbox.post([1])
        async with asyncio.timeout(30):
            while not delivered:
                await asyncio.sleep(0.001)

    asyncio.run(story())
    assert delivered == [1]
