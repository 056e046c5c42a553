"""Two pieces of work that need nothing of each other, side by side in a CUDA graph.

A kernel of a decode step often keeps a fraction of a GPU busy for a few microseconds, and the next one starts when it
is done. In a graph that is captured from two streams, kernels of both run at the same time. Outside of a capture the
work is done in the order it is given: there the host's launches are what takes time, and a second stream would only add
some. So it is where gradients are recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

First = TypeVar("First")
Second = TypeVar("Second")

_of_thread = threading.local()  # two threads that capture must not meet on a stream


def _branch(device: torch.device) -> torch.cuda.Stream:
    streams: dict[torch.device, torch.cuda.Stream] = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def side_by_side(
    first: Callable[[], First], second: Callable[[], Second], device: torch.device
) -> tuple[First, Second]:
    """What both give. Neither may write what the other reads; what they read must outlive the call."""
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return first(), second()
    trunk, branch = torch.cuda.current_stream(device), _branch(device)
    branch.wait_stream(trunk)
    with torch.cuda.stream(branch):
        beside = second()
    result = first()
    # What the branch allocated it frees to itself, and it waits for the trunk before it begins again.
    trunk.wait_stream(branch)
    return result, beside
