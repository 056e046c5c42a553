"""CPU threads of the process that works: how many, and how they wait for each other.

Threads that wait by spinning (the default of the OpenMP runtime in torch) are a little faster on an idle machine and
ten times slower on a busy one, where they keep each other from running.
"""

from __future__ import annotations

import os


def wait_without_spinning() -> None:
    """Must be called before torch is imported. A value that the user has set stays."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use(threads: int) -> None:
    """Use that many threads for torch's operators; 0 leaves torch's choice, one a core."""
    if threads:
        import torch

        torch.set_num_threads(threads)
