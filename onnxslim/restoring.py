"""Which layers go back to what they were so that the outputs keep the fidelity asked for.

Fidelity is 1 minus the noise of the worst output (`probe.noise`) on samples that nothing was learned from.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.probe import noise

# Held-out samples that judge a choice; seconds that ranking the layers and judging one choice may take.
JUDGED, FEWEST = 12, 4
SECONDS, SECONDS_PER_TRIAL = 15.0, 2.0

Run = Callable[[dict[str, np.ndarray], Collection[str]], list[np.ndarray]]


class Judge:
    """Noise of the outputs for any choice of what is changed: squared error over variance, over held-out samples.

    ``run`` gives the outputs for one sample with the chosen names changed; with none, what is exact.
    """

    def __init__(self, run: Run, data: Data, ctx: Context) -> None:
        self.run = run
        self.ctx = ctx
        self.feeds: list[dict[str, np.ndarray]] = []
        self.exact: list[list[np.ndarray]] = []
        start = time.perf_counter()
        for feed in data.spread(JUDGED).feeds():
            self.feeds.append(feed)
            self.exact.append(self.run(feed, ()))
            if len(self.feeds) >= FEWEST and time.perf_counter() - start > SECONDS_PER_TRIAL:
                break

    def noise(self, chosen: Collection[str]) -> float:
        """Of the worst output."""
        return noise([(e, self.run(f, chosen)) for e, f in zip(self.exact, self.feeds, strict=True)])

    def hardest_first(self, chosen: Collection[str]) -> None:
        """Order the samples by the noise that ``chosen`` makes on them: few samples then show what matters."""
        found = [noise([(e, self.run(f, chosen))]) for e, f in zip(self.exact, self.feeds, strict=True)]
        order = sorted(range(len(found)), key=lambda k: -found[k])
        self.feeds, self.exact = [self.feeds[k] for k in order], [self.exact[k] for k in order]

    def rank(self, names: Sequence[str]) -> dict[str, float]:
        """Noise that each of ``names`` makes when it alone is changed; on as many samples as time allows."""
        stop = time.perf_counter() + SECONDS
        totals = dict.fromkeys(names, 0.0)
        tracked = self.ctx.progress.track(self.feeds, total=len(self.feeds), label="sensitivity")
        for count, (feed, exact) in enumerate(zip(tracked, self.exact, strict=True), 1):
            for name in names:
                totals[name] += noise([(exact, self.run(feed, (name,)))])
            if time.perf_counter() + (time.perf_counter() - stop + SECONDS) / count > stop:
                break
        return {name: total / count for name, total in totals.items()}


@dataclasses.dataclass(frozen=True)
class Kept:
    """What stays changed, the noise that each of the others makes alone, and the noise that is left."""

    names: list[str]
    restored: dict[str, float]
    noise: float


def keep(
    names: Sequence[str],
    budget: float,
    noise_of: Callable[[Sequence[str]], float],
    rank: Callable[[Sequence[str]], Mapping[str, float]],
    price: Callable[[str], float] = lambda name: 1.0,
) -> Kept:
    """As many of ``names`` as keep the noise within ``budget``.

    They go back in the order of the noise that each makes alone (``rank``) per its ``price``; how many must is found
    by bisection, and so is how many of these, the least harmful first, fit in after all.
    """
    total = noise_of(names)
    if total <= budget:
        return Kept(list(names), {}, total)
    alone = rank(names)
    order = sorted(names, key=lambda n: (-alone[n] / price(n), n))
    low, high = 1, len(order)  # the number of names to put back lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        if noise_of(order[middle:]) <= budget:
            high = middle
        else:
            low = middle + 1
    gone = sorted(order[:high], key=lambda n: (alone[n], n))
    low, high = 0, max(len(gone) - 1, 0)  # the number of those that stay changed after all lies in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        left = set(gone[middle:])
        if noise_of([n for n in names if n not in left]) <= budget:
            low = middle
        else:
            high = middle - 1
    left = set(gone[low:])
    kept = [n for n in names if n not in left]
    return Kept(kept, {n: alone[n] for n in order if n in left}, noise_of(kept) if kept else 0.0)
