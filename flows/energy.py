"""How much energy a stage took: measured where Linux shows the processor's own counters (RAPL), otherwise estimated.

The estimate is wall time × `run.cpu_watts`, an assumption that the summary prints beside the number. The counters
cover the whole machine, so what else runs on it is counted too. Memory, disks and graphics cards are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_COUNTERS = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """Joules, and whether they were measured."""

    joules: float
    measured: bool


class Meter:
    """Starts counting when made."""

    def __init__(self, assumed_watts: float) -> None:
        self._assumed_watts = assumed_watts
        self._start = _read()

    def read(self, seconds: float) -> Energy:
        """Energy since the meter was made, `seconds` ago."""
        end = _read()
        if self._start and end and self._start.keys() == end.keys():
            joules = 0.0
            for zone, (microjoules, limit) in end.items():
                joules += ((microjoules - self._start[zone][0]) % (limit + 1)) / 1e6  # the counter wraps
            return Energy(joules, True)
        return Energy(seconds * self._assumed_watts, False)


def _read() -> dict[str, tuple[int, int]]:
    zones: dict[str, tuple[int, int]] = {}
    for zone in sorted(_COUNTERS.glob("intel-rapl:[0-9]")):
        try:
            value = int((zone / "energy_uj").read_text())
            zones[zone.name] = (value, int((zone / "max_energy_range_uj").read_text()))
        except (OSError, ValueError):
            return {}
    return zones
