"""How many channels each family gives up: the cheapest ones first, in steps that the kernels can use."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass
class Candidate:
    """A family of ``count`` units, ``error[m - 1]`` after its m cheapest have left, ``parameters`` saved by each unit.

    ``step``: the number of units that stay should be a multiple of it.
    """

    count: int
    error: np.ndarray
    parameters: int
    step: int

    def widths(self) -> list[int]:
        """Numbers of units to remove that leave a width the kernels like, ascending."""
        most = min(len(self.error), self.count - 1)
        return [m for m in range(1, most + 1) if (self.count - m) % self.step == 0]


def step_of(channels: int, units: int) -> int:
    """Units per step for an axis of ``channels`` made of ``units``.

    Vector kernels work on 16 channels at a time, and a width between two multiples costs more than the next larger one;
    narrow layers get finer steps, or there would be nothing to choose.
    """
    wide = 16 if channels >= 64 else 8 if channels >= 32 else 4 if channels >= 16 else 1
    return max(1, wide * units // channels)


def within(candidates: Sequence[Candidate], tolerance: float) -> list[int]:
    """Units to remove per family so that no family's error passes ``tolerance``."""
    return [max((m for m in c.widths() if c.error[m - 1] <= tolerance), default=0) for c in candidates]


def at_ratio(candidates: Sequence[Candidate], ratio: float) -> list[int]:
    """Units to remove per family, saving what cutting ``ratio`` of every family would, where it costs least.

    The error is made as small as it gets by always taking the step with the least error per parameter; no family gives
    up more than twice its share.
    """
    goal = sum(ratio * c.count * c.parameters for c in candidates)
    removed = [0] * len(candidates)
    widths = [[m for m in c.widths() if m <= max(2 * ratio * c.count, 1)] for c in candidates]
    queue: list[tuple[float, int, int]] = []

    def offer(k: int) -> None:
        """Queue the best next step of family k: the one with the least error per parameter, however long."""
        c = candidates[k]
        ahead = [m for m in widths[k] if m > removed[k]]
        if ahead:
            base = c.error[removed[k] - 1] if removed[k] else 0.0
            price = [(c.error[m - 1] - base) / ((m - removed[k]) * max(c.parameters, 1)) for m in ahead]
            best = int(np.argmin(price))
            heapq.heappush(queue, (price[best], k, ahead[best]))

    for k in range(len(candidates)):
        offer(k)
    saved = 0.0
    while queue and saved < goal:
        _, k, m = heapq.heappop(queue)
        # The last step may be longer than what is still missing: stop where it is reached.
        missing = (goal - saved) / max(candidates[k].parameters, 1)
        m = min((w for w in widths[k] if w > removed[k] and w - removed[k] >= missing), default=m) if missing < m else m
        saved += (m - removed[k]) * candidates[k].parameters
        removed[k] = m
        offer(k)
    return removed
