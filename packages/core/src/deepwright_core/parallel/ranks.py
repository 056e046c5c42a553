"""The processes that share one model: who I am among them, which share is mine, and the few things we say.

All of them are on this host. Tensors travel by NCCL between GPUs and by gloo between CPUs; what the host itself must
know travels by gloo over the loopback interface. Left out: several hosts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RequestError

# A server may be idle for long, and its ranks wait for the next step all that while. One that dies closes its
# connections, which the others notice at once.
PATIENCE = timedelta(days=365)
LOOK_SECONDS = 0.02


@dataclass(frozen=True)
class Ranks:
    """rank of `world`; group: for what the hosts say to each other."""

    rank: int
    world: int
    group: dist.ProcessGroup

    @classmethod
    def join(
        cls, rank: int, world: int, meeting: Path, device: torch.device, look: Callable[[], None] = lambda: None
    ) -> Ranks:
        """Meet the others at a file that all can write (new for each meeting); returns when all are there.

        look: called now and then while others are missing; it raises when they will not come.
        """
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody else may listen, or connect
        store = dist.FileStore(str(meeting), world)
        store.set(f"here {rank}", "yes")
        # Not left to what follows, which would wait for the missing as long as for a step.
        while not all(store.check([f"here {other}"]) for other in range(world)):
            look()
            time.sleep(LOOK_SECONDS)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
        return cls(rank, world, dist.new_group(backend="gloo", timeout=PATIENCE))

    def leave(self) -> None:
        """Leave the group, as all do at the same time."""
        dist.destroy_process_group()

    def share(self, count: int, what: str) -> slice:
        """Which of `count` things are this rank's; `RequestError` when they cannot be shared out evenly."""
        if count % self.world:
            raise RequestError(f"{what} are {count}; expected a multiple of the {self.world} ranks that share them.")
        each = count // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same bits on each; in place."""
        dist.all_reduce(x)
        return x

    def tell(self, x: Tensor) -> None:
        """Rank 0's tensor becomes everybody's, on the device."""
        dist.broadcast(x, 0)

    def tell_hosts(self, x: Tensor) -> None:
        """The same for a tensor on the CPU."""
        dist.broadcast(x, 0, group=self.group)
