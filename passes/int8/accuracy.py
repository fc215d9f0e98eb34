"""Which layers cost too much fidelity: simulated one by one in a single session, then left in float worst first."""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.passes.int8.prepare import Prepared
from onnxslim.probe import Switched, noise

# Held-out samples that judge a choice; seconds that ranking the layers and judging one choice may take.
JUDGED, FEWEST = 12, 4
SECONDS, SECONDS_PER_TRIAL = 15.0, 2.0
# A layer in float costs its MACs and the conversion of its inputs and outputs: so many MACs per element, and at least.
MACS_PER_ELEMENT, MACS_PER_LAYER = 64, 1e6


class Judge:
    """Noise of the outputs for any choice of units: squared error over variance, over all held-out samples."""

    def __init__(self, model: ir.Model, ready: Prepared, data: Data, ctx: Context) -> None:
        self.ready = ready
        self.ctx = ctx
        self.switched = Switched(model, ready.plan(ready.choose(ready.products)), ctx.threads)
        self.feeds: list[dict[str, np.ndarray]] = []
        self.exact: list[list[np.ndarray]] = []
        start = time.perf_counter()
        for feed in data.spread(JUDGED).feeds():
            self.feeds.append(feed)
            self.exact.append(self.switched(feed, ()))
            if len(self.feeds) >= FEWEST and time.perf_counter() - start > SECONDS_PER_TRIAL:
                break

    def noise(self, chosen: Collection[str]) -> float:
        """Of the worst output."""
        return noise([(e, self.switched(f, chosen)) for e, f in zip(self.exact, self.feeds, strict=True)])

    def hardest_first(self, chosen: Collection[str]) -> None:
        """Order the samples by the noise that ``chosen`` makes on them: few samples then show what matters."""
        found = [noise([(e, self.switched(f, chosen))]) for e, f in zip(self.exact, self.feeds, strict=True)]
        order = sorted(range(len(found)), key=lambda k: -found[k])
        self.feeds, self.exact = [self.feeds[k] for k in order], [self.exact[k] for k in order]

    def rank(self, products: list[str]) -> dict[str, float]:
        """Noise that each product makes when it alone runs on integers; on as many samples as time allows."""
        stop = time.perf_counter() + SECONDS
        totals = dict.fromkeys(products, 0.0)
        tracked = self.ctx.progress.track(self.feeds, total=len(self.feeds), label="sensitivity")
        for count, (feed, exact) in enumerate(zip(tracked, self.exact, strict=True), 1):
            for name in products:
                totals[name] += noise([(exact, self.switched(feed, (name,)))])
            if time.perf_counter() + (time.perf_counter() - stop + SECONDS) / count > stop:
                break
        return {name: total / count for name, total in totals.items()}


def restore(judge: Judge, fidelity: float) -> tuple[list[str], dict[str, str], float]:
    """Products that stay on integers so that noise is at most 1 - ``fidelity``, the others with the reason, the noise.

    Layers leave in the order of noise per cost; how many must is found by bisection on the simulated model.
    """
    ready = judge.ready
    products = list(ready.products)
    budget = 1 - fidelity
    judge.hardest_first(ready.choose(products))
    total = judge.noise(ready.choose(products))
    if fidelity == 0 or total <= budget:
        return products, {}, total
    alone = judge.rank(products)

    def price(name: str) -> float:
        unit = ready.units[name]
        elements = sum(ready.sizes.get(v, 0.0) for v in (*unit.inputs, *unit.outputs))
        return ready.macs[name] + MACS_PER_ELEMENT * elements + MACS_PER_LAYER

    order = sorted(products, key=lambda n: (-alone[n] / price(n), n))
    low, high = 1, len(order)  # the number of layers to leave in float lies in [low, high]
    while low < high:
        middle = (low + high) // 2
        if judge.noise(ready.choose(order[middle:])) <= budget:
            high = middle
        else:
            low = middle + 1
    gone = _put_back(judge, products, order[:high], alone, budget)
    reached = judge.noise(ready.choose([n for n in products if n not in gone]))
    reasons = {n: f"in int8 it alone takes {alone[n]:.2%} of an output's variance" for n in order if n in gone}
    return [n for n in products if n not in reasons], reasons, reached


def _put_back(judge: Judge, products: list[str], gone: list[str], alone: dict[str, float], budget: float) -> set[str]:
    """``gone`` without the layers that matter least and fit into the budget after all, again by bisection."""
    order = sorted(gone, key=lambda n: (alone[n], n))
    low, high = 0, max(len(order) - 1, 0)  # the number of layers to put back lies in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        trial = set(order[middle:])
        if judge.noise(judge.ready.choose([n for n in products if n not in trial])) <= budget:
            low = middle
        else:
            high = middle - 1
    return set(order[low:])
