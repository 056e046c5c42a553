"""Where the tokens of a stream wait for its writer: nothing is lost, and silence is told in time."""

from __future__ import annotations

import asyncio

from deepwright_serve.arrivals import Arrivals


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
