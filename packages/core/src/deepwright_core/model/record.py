"""What a training forward pass reports beside its output: auxiliary losses and the load of each expert.

Passed down explicitly, so that modules keep no state between calls, and a layer that runs twice (activation
recomputation) overwrites its own entry instead of counting twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class ForwardRecord:
    """One forward pass.

    real_BS: True where a token is real, None when all are (padding takes no part in balancing).
    losses: auxiliary loss by layer, already weighted. loads: tokens sent to each expert by layer, [E].
    """

    real_BS: Tensor | None = None
    losses: dict[int, Tensor] = field(default_factory=dict)
    loads: dict[int, Tensor] = field(default_factory=dict)
