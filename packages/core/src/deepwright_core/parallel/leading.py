"""Rank 0's side: a model whose calls the other ranks make too, and the processes in which they do.

The engine runs on rank 0 alone and sees a model like any other. Each call of `extend` is told to the other ranks, which
have the same cache and make the same call; inside it the mixtures add up what the ranks' experts give. Scheduling,
sampling and logits are rank 0's business. So attention is computed by every rank, and every rank holds a cache.

Left out: CUDA graphs (a replay would tell nobody; the engine's `graphs` is "off") and speculation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor, nn

from ..errors import WorkError
from ..model.cache import CacheBatch
from ..model.transformer import Transformer
from .ranks import Ranks

OPEN, EXTEND, GOODBYE = range(3)
"""What a message to the other ranks begins with: a new cache of [slots, is FP8]; a call of [B, Q, P, block size]; the
end."""
MESSAGE = 5
GOODBYE_SECONDS = 10.0


class LeadingModel(nn.Module):
    """Rank 0's part of a model, as a `GenerationModel`."""

    def __init__(self, model: Transformer, ranks: Ranks) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._ranks = ranks
        self._told: list[int] = []  # addresses of the cache that the others have the like of
        self.eval()

    @property
    def cache_widths(self) -> list[int]:
        """Values cached per token, layer by layer, on each rank."""
        return self.model.cache_widths

    @property
    def fp8_cache_bytes(self) -> list[int | None]:
        """Bytes cached per token in FP8, layer by layer; None where an attention has no such cache."""
        return self.model.fp8_cache_bytes

    @property
    def max_positions(self) -> int:
        """Longest sequence, in tokens."""
        return self.model.max_positions

    def extend(self, tokens_BQ: Tensor, cache: list[Tensor], batch: CacheBatch) -> Tensor:
        """Write the new tokens into the cache, on all ranks, and return their hidden states [B, Q, D]."""
        addresses = [layer_NW.data_ptr() for layer_NW in cache]
        if addresses != self._told:
            self._say(OPEN, len(cache[0]), int(cache[0].dtype == torch.uint8))
            self._told = addresses
        self._say(EXTEND, *tokens_BQ.shape, batch.blocks_BP.shape[1], batch.block_size)
        parts = (tokens_BQ, batch.positions_BQ, batch.slots_BQ, batch.blocks_BP, batch.lengths_B)
        self._ranks.tell(torch.cat([part.flatten() for part in parts]))
        return self.model.extend(tokens_BQ, cache, batch)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits of hidden states, by this rank."""
        return self.model.logits(hidden)

    def leave(self) -> None:
        """Say goodbye to the other ranks. All leave together: NCCL waits for the last."""
        self._say(GOODBYE)
        self._ranks.leave()

    def _say(self, *message: int) -> None:
        self._ranks.tell_hosts(torch.tensor([*message, *[0] * (MESSAGE - len(message))]))


def told(ranks: Ranks, device: torch.device) -> Iterator[tuple[int, list[int], list[Tensor]]]:
    """The other ranks' end of it, until the goodbye: kind of message, its numbers, and the tensors of a call."""
    while True:
        message = torch.zeros(MESSAGE, dtype=torch.int64)
        ranks.tell_hosts(message)
        kind, *numbers = message.tolist()
        if kind == GOODBYE:
            return
        tensors: list[Tensor] = []
        if kind == EXTEND:
            batch, queries, blocks, _ = numbers
            shapes = [(batch, queries)] * 3 + [(batch, blocks), (batch,)]
            sizes = [batch * queries] * 3 + [batch * blocks, batch]
            whole = torch.empty(sum(sizes), dtype=torch.int64, device=device)
            ranks.tell(whole)
            tensors = [part.view(shape) for part, shape in zip(whole.split(sizes), shapes, strict=True)]
        yield kind, numbers, tensors


class Followers:
    """The processes of ranks 1 .. world - 1. They end with this one, whatever becomes of it.

    loss: what became of the first that ended and should not have, in a sentence.
    """

    def __init__(
        self,
        directory: Path,
        world: int,
        meeting: Path,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        self._ending = False
        self._lost = threading.Event()
        self.loss: str | None = None
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, world):
            place = f"cuda:{rank}" if device.type == "cuda" else "cpu"
            task = {
                "directory": str(directory.resolve()),
                "rank": rank,
                "world": world,
                "meeting": str(meeting),
                "device": place,
                "dtype": str(dtype).removeprefix("torch."),
                "threads": threads,
            }
            words = [sys.executable, "-m", "deepwright_core.parallel.following", json.dumps(task)]
            # Standard input stays open while this process lives.
            process = subprocess.Popen(words, stdin=subprocess.PIPE)
            self._processes.append(process)
            threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        status = process.wait()
        if not self._ending and self.loss is None:
            self.loss = (
                f"Rank {rank} of the {len(self._processes) + 1} that share the experts ended with status {status}; "
                "without its experts there is no model (its last words are above)."
            )
            self._lost.set()

    def look(self) -> None:
        """`WorkError` when one has been lost."""
        if self.loss is not None:
            raise WorkError(self.loss)

    def wait_for_loss(self) -> None:
        """Return when one is lost (or never)."""
        self._lost.wait()

    def end(self) -> None:
        """End them, and wait for it."""
        self._ending = True
        for process in self._processes:
            stdin: IO[bytes] | None = process.stdin
            if stdin is not None:
                stdin.close()
        for process in self._processes:
            try:
                process.wait(GOODBYE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
