"""The server as its clients find it: streams of completions over HTTP, asked for by processes of their own.

Clients speak HTTP/1.1 over plain sockets and only look for events, because a full client library takes longer over an
event than the server does. Every stream begins at the same time: the first token waits for the prompts of all.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import httpx
import tokenizers
from tokenizers import decoders, models

from deepwright_core.tokenizer import Tokenizer
from deepwright_serve import child
from deepwright_serve.child import ServerProcess

from .load import percentiles
from .throughput import prompts

DRAIN_SECONDS = 30


@dataclass(frozen=True)
class Streams:
    """tokens_per_second: between the first stream's first event and the last one's last. Milliseconds by percentile."""

    streams: int
    tokens_per_second: float
    first_token: dict[str, float]
    gap: dict[str, float]


def pair_tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-level tokenizer of as many tokens as a model with random weights has: bytes, and pairs of bytes."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in letters for b in letters][: max(0, vocabulary - len(letters))]
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in pairs)])}
    bpe = tokenizers.Tokenizer(models.BPE(vocab, pairs))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return Tokenizer(bpe.to_str())


async def _stream(address: str, body: bytes, begin: float) -> tuple[int, list[float]]:
    """(tokens, when each event came, in seconds of the machine's monotonic clock) of one completion."""
    place = urlsplit(address)
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    try:
        await asyncio.sleep(max(0.0, begin - time.monotonic()))
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        status = (await reader.readline()).decode().strip()
        if " 200 " not in f"{status} ":
            raise RuntimeError(f"{status}: {(await reader.read(2000)).decode(errors='replace')}")
        times, tokens = [], 0
        while line := await reader.readline():
            if line == b"data: [DONE]\n":
                break
            if not line.startswith(b"data: "):
                continue
            if b'"choices":[]' in line:
                tokens = json.loads(line[6:])["usage"]["completion_tokens"]
            else:
                times.append(time.monotonic())
        return tokens, times
    finally:
        writer.close()


def _client(address: str, bodies: Sequence[bytes], begin: float) -> list[tuple[int, list[float]]]:
    async def together() -> list[tuple[int, list[float]]]:
        return await asyncio.gather(*(_stream(address, body, begin) for body in bodies))

    return asyncio.run(together())


def stream_together(address: str, vocabulary: int, streams: int, prompt: int, tokens: int, seed: int) -> Streams:
    """`streams` completions of `tokens` tokens each after random prompts, greedy, all at once."""
    bodies = [
        json.dumps(
            {
                "model": "bench",
                "prompt": ids,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        for ids in prompts(vocabulary, streams, prompt, seed)
    ]
    clients = min(streams, 8, max(1, (os.cpu_count() or 2) // 2))
    with ProcessPoolExecutor(clients, mp_context=get_context("spawn")) as pool:
        list(pool.map(abs, range(clients)))  # they are there
        begin = time.monotonic() + 0.5 + 0.002 * streams
        shares = [pool.submit(_client, address, bodies[i::clients], begin) for i in range(clients)]
        answers = [answer for share in shares for answer in share.result()]
    first = [times[0] - begin for _, times in answers]
    gaps = [b - a for _, times in answers for a, b in pairwise(times)]
    seconds = max(times[-1] for _, times in answers) - min(times[0] for _, times in answers)
    return Streams(streams, sum(count for count, _ in answers) / seconds, percentiles(first), percentiles(gaps))


def hang_up_half(address: str, vocabulary: int, streams: int) -> float:
    """Begin `streams` completions, hang up on half of them midway; the share of the cache in use when all is over."""

    async def story() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=httpx.Limits(max_connections=None)) as http:

            async def one(index: int, ids: list[int]) -> None:
                body = {"model": "bench", "prompt": ids, "max_tokens": 100, "ignore_eos": True, "stream": True}
                async with http.stream("POST", "/v1/completions", json=body) as reply:
                    reply.raise_for_status()
                    seen = 0
                    async for _ in reply.aiter_lines():
                        seen += 1
                        if index % 2 and seen > index % 50:
                            return

            await asyncio.gather(*(one(i, ids) for i, ids in enumerate(prompts(vocabulary, streams, 64, seed=7))))

    asyncio.run(story())
    deadline = time.monotonic() + DRAIN_SECONDS
    while (used := _metric(address, "vllm:kv_cache_usage_perc")) and time.monotonic() < deadline:
        time.sleep(0.1)
    return used


def _metric(address: str, name: str) -> float:
    text = httpx.get(f"{address}/metrics", timeout=30).raise_for_status().text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


@contextmanager
def served(model: Path, device: str, streams: int, cache_tokens: int) -> Iterator[ServerProcess]:
    """A server with room for so many streams at once; afterwards it must end by itself when it is asked to."""
    options = [
        *("--device", device, "--name", "bench", "--cache-tokens", str(cache_tokens)),
        *("--max-running", str(streams), "--max-waiting", "1024", "--max-connections", "2048"),
    ]
    with TemporaryDirectory() as folder:
        server = child.start(model, Path(folder), options, port=0, keep=False, limit=300)
        try:
            yield server
        finally:
            status = server.stop(DRAIN_SECONDS)
        if status:
            raise RuntimeError(f"the server ended with status {status}:\n{child.tail(server.log)}")
