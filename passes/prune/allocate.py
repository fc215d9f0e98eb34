"""How many channels each family gives up: a knapsack over the widths that the kernels can use.

Every family has a price list, the error for each number of units that may leave. What is saved is not a sum over
families, since a weight shrinks on both axes: the savings of each family are taken at the widths that the others have,
and solved again at the new widths (`onnxslim.passes.prune.budget` counts exactly).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

LEVELS = 4000  # the knapsack counts savings in this many parts of the largest possible saving
WIDEST = 16  # channels that the kernels take at a time, where they are not asked
ROUNDS = 10  # at most this many relinearizations


@dataclasses.dataclass
class Candidate:
    """A family of ``count`` units: ``error[m - 1]`` after its m cheapest have left.

    ``step``: the number of units that stay should be a multiple of it. ``most``: at most so many may leave.
    ``fixed``: just so many leave, whatever that costs and saves.
    """

    count: int
    error: np.ndarray
    step: int
    most: int
    fixed: int | None = None

    def widths(self) -> np.ndarray:
        """Numbers of units to remove that leave a width the kernels like, ascending, 0 among them."""
        if self.fixed is not None:
            return np.array([self.fixed])
        most = min(len(self.error), self.count - 1, self.most)
        return np.array([0, *(m for m in range(1, most + 1) if (self.count - m) % self.step == 0)])

    def prices(self) -> np.ndarray:
        """The error at each of `widths`, beyond that of the first of them."""
        errors = np.concatenate([[0.0], self.error])[self.widths()]
        return errors - errors[0]


Spent = Callable[[Sequence[int]], float]  # what is left of a budgeted quantity when so many units leave each family


def step_of(channels: int, units: int, widest: int = WIDEST) -> int:
    """Units per step for an axis of ``channels`` made of ``units``.

    Vector kernels work on ``widest`` channels at a time (see `onnxslim.kernel_steps`), and a width between two
    multiples costs more than the next larger one; narrow layers get finer steps, or there would be nothing to choose.
    """
    step = widest
    while channels < 4 * step:
        step //= 2
    return max(1, (step if step >= 4 else 1) * units // channels)


def within(candidates: Sequence[Candidate], spent: Spent, tolerance: float) -> list[int]:
    """Units to remove per family that save most while the errors add up to at most ``tolerance``."""
    best = [int(c.widths()[0]) for c in candidates]
    least = spent(best)
    current = best
    for _ in range(ROUNDS):
        savings, _ = _linear(candidates, spent, current)
        found = _Knapsack([c.prices() for c in candidates], savings).most_saved(tolerance)
        current = [int(c.widths()[k]) for c, k in zip(candidates, found, strict=True)]
        left = spent(current)
        if left >= least * (1 - 1e-9):
            break
        best, least = current, left
    return best


def down_to(candidates: Sequence[Candidate], spent: Spent, goal: float) -> list[int]:
    """Units to remove per family so that ``spent`` comes down to ``goal`` with the least sum of errors.

    Where the goal cannot be reached, what comes closest.
    """
    none = [int(c.widths()[0]) for c in candidates]
    full = [int(c.widths()[-1]) for c in candidates]
    if spent(full) >= goal:
        return full
    # What a family saves hangs on the widths of the others, so that the search ends elsewhere from each end of the
    # range; the cheaper of the two plans is rarely far from the best.
    plans = [_trim(candidates, spent, goal, _relinearized(candidates, spent, goal, start)) for start in (none, full)]
    return min(plans, key=lambda plan: _price(candidates, plan))


def _relinearized(candidates: Sequence[Candidate], spent: Spent, goal: float, start: Sequence[int]) -> list[int]:
    """The cheapest plan met that reaches ``goal``, which can be, as savings are linearized at one plan after another.

    The first is ``start``.
    """
    current = list(start)
    best, price, slack = [int(c.widths()[-1]) for c in candidates], np.inf, 0.0
    for _ in range(ROUNDS):
        savings, base = _linear(candidates, spent, current)
        found = _Knapsack([c.prices() for c in candidates], savings).cheapest(base - goal + slack)
        chosen = [int(c.widths()[k]) for c, k in zip(candidates, found, strict=True)]
        missing = spent(chosen) - goal
        if missing <= 1e-9 * abs(goal):
            cost = _price(candidates, chosen)
            if cost < price:
                best, price = chosen, cost
        else:
            slack += missing
        if chosen == current and missing <= 1e-9 * abs(goal):
            break
        current = chosen
    return best


def _price(candidates: Sequence[Candidate], plan: Sequence[int]) -> float:
    """The sum of errors when so many units leave each family."""
    return sum(float(c.prices()[list(c.widths()).index(m)]) for c, m in zip(candidates, plan, strict=True))


def _linear(candidates: Sequence[Candidate], spent: Spent, current: Sequence[int]) -> tuple[list[np.ndarray], float]:
    """What every width of every family saves, the others as in ``current``, and what the sum is counted from.

    The latter makes the sum of savings exact at ``current``.
    """
    savings = []
    for k, candidate in enumerate(candidates):
        trial = list(current)
        left = []
        for m in candidate.widths():
            trial[k] = int(m)
            left.append(spent(trial))
        savings.append(left[0] - np.array(left))
    own = sum(float(s[list(c.widths()).index(m)]) for s, c, m in zip(savings, candidates, current, strict=True))
    return savings, spent(current) + own


def _trim(candidates: Sequence[Candidate], spent: Spent, goal: float, chosen: list[int]) -> list[int]:
    """Give units back, the dearest first, while the goal stays reached."""
    result = list(chosen)
    while True:
        best, gain = None, 0.0
        for k, candidate in enumerate(candidates):
            widths = candidate.widths()
            place = int(np.searchsorted(widths, result[k]))
            if not place:
                continue
            trial = [*result[:k], int(widths[place - 1]), *result[k + 1 :]]
            saved = float(candidate.prices()[place] - candidate.prices()[place - 1])
            if saved > gain and spent(trial) <= goal:
                best, gain = trial, saved
        if best is None:
            return result
        result = best


class _Knapsack:
    """One choice per family: ``price[k][j]`` for saving at least ``savings[k][j]``, solved for all savings at once."""

    def __init__(self, prices: Sequence[np.ndarray], savings: Sequence[np.ndarray]) -> None:
        most = sum(float(s.max()) for s in savings)
        self.unit = max(most, 1e-30) / LEVELS
        self.least = np.full(LEVELS + 1, np.inf)  # the least error for saving at least so many levels
        self.least[0] = 0.0
        self.picks: list[tuple[np.ndarray, np.ndarray]] = []
        for price, saving in zip(prices, savings, strict=True):
            steps = np.floor(saving / self.unit + 1e-9).astype(int)
            best = np.full(LEVELS + 1, np.inf)
            pick = np.zeros(LEVELS + 1, int)
            for j in range(len(price)):
                if j and steps[j] <= 0:
                    continue  # saves nothing
                shifted = np.full(LEVELS + 1, np.inf)
                shifted[steps[j] :] = self.least[: LEVELS + 1 - steps[j]] + price[j]
                better = shifted < best
                best[better], pick[better] = shifted[better], j
            self.least = best
            self.picks.append((pick, steps))

    def cheapest(self, saving: float) -> list[int]:
        """The choices with the least error that save ``saving``, or as much as they can."""
        level = max(int(np.ceil(saving / self.unit - 1e-9)), 0)
        reachable = np.flatnonzero(np.isfinite(self.least))
        enough = reachable[reachable >= level]
        if not len(enough):
            return self._choices(int(reachable[-1]))
        return self._choices(int(enough[np.argmin(self.least[enough])]))

    def most_saved(self, tolerance: float) -> list[int]:
        """The choices that save most with an error of at most ``tolerance``."""
        return self._choices(int(np.flatnonzero(self.least <= tolerance)[-1]))

    def _choices(self, level: int) -> list[int]:
        chosen = []
        for pick, steps in reversed(self.picks):
            j = int(pick[level])
            chosen.append(j)
            level -= int(steps[j])
        return chosen[::-1]
