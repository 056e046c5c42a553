"""CPU threads of the process that works: how many, and how they wait for each other.

Threads that wait for each other by spinning alone (the default of the OpenMP runtime in torch) are fast on an idle
machine and ten times slower on a busy one, where they keep each other from running. Threads that sleep at once are slow
to wake on a virtual machine. A short spin before sleeping does well on both.
"""

from __future__ import annotations

import os

SPINS = "1000"


def wait_with_short_spins() -> None:
    """Must be called before torch is imported. What the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def use(threads: int) -> None:
    """Use that many threads for torch's operators; 0 leaves torch's choice, one a core."""
    if threads:
        import torch

        torch.set_num_threads(threads)
