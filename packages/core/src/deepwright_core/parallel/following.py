"""A rank that follows: it loads its share of the experts and makes the calls that rank 0 tells it to.

`python -m deepwright_core.parallel.following TASK` is started by `leading.Followers`; TASK is JSON. It ends when
standard input is closed, which is when rank 0 has ended or wants it to, and when a call fails.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from ..engine.runner import new_cache
from ..errors import RequestError
from ..model.cache import CacheBatch
from ..plugins import installed
from .experts import load_share
from .leading import OPEN, told
from .ranks import Ranks


def follow(task: dict[str, Any]) -> None:
    """Be rank `task["rank"]` until rank 0 says goodbye."""
    torch.set_num_threads(task["threads"])
    device = torch.device(task["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks.join(task["rank"], task["world"], Path(task["meeting"]), device)
    dtype = getattr(torch, task["dtype"])
    model = load_share(Path(task["directory"]), installed().registry, ranks, device, dtype)
    weight = next(model.parameters())
    cache: list[torch.Tensor] = []
    with torch.inference_mode():
        for kind, numbers, tensors in told(ranks, device):
            if kind == OPEN:
                slots, fp8 = numbers[:2]
                cache = []  # before the next is made
                cache = new_cache(model, slots, "fp8" if fp8 else "auto", weight, 0)
            else:
                tokens_BQ, positions_BQ, slots_BQ, blocks_BP, lengths_B = tensors
                batch = CacheBatch(positions_BQ, slots_BQ, blocks_BP, lengths_B, numbers[3])
                model.extend(tokens_BQ, cache, batch)
    ranks.leave()


def _end_with_standard_input() -> None:
    # Not sys.stdin: a thread that waits inside its buffer would hold the lock that the interpreter needs to end.
    while os.read(0, 4096):
        pass
    os._exit(0)


def main() -> None:
    """The command."""
    # A terminal's Ctrl-C and a service manager's end reach all processes; rank 0 decides what is finished first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ending = threading.Thread(target=_end_with_standard_input, daemon=True)
    ending.start()
    try:
        follow(json.loads(sys.argv[1]))
        ending.join()
    except RequestError as error:
        print("\n".join(error.problems), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
