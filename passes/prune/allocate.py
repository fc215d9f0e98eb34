"""How many channels each family gives up: the cheapest ones first, in steps that the kernels can use."""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass
class Candidate:
    """A family of ``count`` units: ``error[m - 1]`` after its m cheapest have left, ``gain`` for each that leaves.

    ``step``: the number of units that stay should be a multiple of it.
    """

    count: int
    error: np.ndarray
    gain: float
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
    """Units to remove per family so that the errors add up to at most ``tolerance``."""
    return _cheapest(candidates, [c.widths() for c in candidates], tolerance, np.inf)


def at_ratio(candidates: Sequence[Candidate], ratio: float) -> list[int]:
    """Units to remove per family, gaining what cutting ``ratio`` of every family would, where it costs least.

    No family gives up more than twice its share.
    """
    goal = sum(ratio * c.count * c.gain for c in candidates)
    widths = [[m for m in c.widths() if m <= max(2 * ratio * c.count, 1)] for c in candidates]
    return _cheapest(candidates, widths, np.inf, goal)


def _cheapest(
    candidates: Sequence[Candidate], widths: Sequence[Sequence[int]], tolerance: float, goal: float
) -> list[int]:
    """Always take the step with the least error per gain, until ``goal`` is gained or ``tolerance`` would be passed."""
    removed = [0] * len(candidates)
    queue: list[tuple[float, int, int]] = []

    def offer(k: int) -> None:
        """Queue the best next step of family k: the one with the least error per gain, however long."""
        c = candidates[k]
        ahead = [m for m in widths[k] if m > removed[k]]
        if ahead:
            price = [(_error(c, m) - _error(c, removed[k])) / ((m - removed[k]) * max(c.gain, 1e-30)) for m in ahead]
            best = int(np.argmin(price))
            heapq.heappush(queue, (price[best], k, ahead[best]))

    for k in range(len(candidates)):
        offer(k)
    gained = spent = 0.0
    while queue and gained < goal:
        _, k, m = heapq.heappop(queue)
        c = candidates[k]
        # A step may be longer than what is still missing, or than what is still allowed: take the part that fits.
        fitting = [w for w in widths[k] if removed[k] < w <= m]
        enough = [w for w in fitting if gained + (w - removed[k]) * c.gain >= goal]
        m = min(enough, default=m)
        allowed = [w for w in fitting if w <= m and spent + _error(c, w) - _error(c, removed[k]) <= tolerance]
        if not allowed:
            continue
        m = max(allowed)
        gained += (m - removed[k]) * c.gain
        spent += _error(c, m) - _error(c, removed[k])
        removed[k] = m
        offer(k)
    return removed


def _error(candidate: Candidate, m: int) -> float:
    return float(candidate.error[m - 1]) if m else 0.0
