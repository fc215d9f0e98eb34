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

# Held-out samples that judge a choice, and seconds that ranking the layers may take.
JUDGED, SECONDS = 16, 30.0
# A layer in float costs its MACs and the conversion of its inputs and outputs; an element converted is worth so many.
MACS_PER_ELEMENT = 64


class Judge:
    """Noise of the outputs for any choice of units: squared error over variance, over all held-out samples."""

    def __init__(self, model: ir.Model, ready: Prepared, data: Data, ctx: Context) -> None:
        self.ready = ready
        self.ctx = ctx
        self.switched = Switched(model, ready.plan(ready.choose(ready.products)), ctx.threads)
        self.feeds = list(data.spread(JUDGED).feeds())
        self.exact = [self.switched(feed, ()) for feed in self.feeds]

    def noise(self, chosen: Collection[str], samples: int = JUDGED) -> float:
        """Of the worst output, over the first ``samples`` samples."""
        pairs = [(e, self.switched(f, chosen)) for e, f in zip(self.exact[:samples], self.feeds, strict=False)]
        return noise(pairs)

    def rank(self, products: list[str]) -> dict[str, float]:
        """Noise that each product makes when it alone runs on integers."""
        start = time.perf_counter()
        self.noise(products[:1], 1)
        each = time.perf_counter() - start
        samples = int(np.clip(SECONDS / (each * len(products)), 1, len(self.feeds)))
        tracked = self.ctx.progress.track(products, total=len(products), label="sensitivity")
        return {name: self.noise((name,), samples) for name in tracked}


def restore(judge: Judge, fidelity: float) -> tuple[list[str], dict[str, str], float]:
    """Products that stay on integers so that noise is at most 1 - ``fidelity``, the others with the reason, the noise.

    Layers leave in the order of noise per cost; how many must is found by bisection on the simulated model.
    """
    ready = judge.ready
    products = list(ready.products)
    budget = 1 - fidelity
    total = judge.noise(ready.choose(products))
    if fidelity == 0 or total <= budget:
        return products, {}, total
    alone = judge.rank(products)

    def price(name: str) -> float:
        unit = ready.units[name]
        elements = sum(ready.sizes.get(v, 0.0) for v in (*unit.inputs, *unit.outputs))
        return ready.macs[name] + MACS_PER_ELEMENT * elements + 1

    order = sorted(products, key=lambda n: (-alone[n] / price(n), n))
    low, high = 1, len(order)  # the number of layers to leave in float lies in [low, high]
    reached = 0.0
    while low < high:
        middle = (low + high) // 2
        found = judge.noise(ready.choose(order[middle:]))
        if found <= budget:
            high, reached = middle, found
        else:
            low = middle + 1
    gone = order[:high]
    reasons = {n: f"in int8 it alone takes {alone[n]:.2%} of an output's variance" for n in gone}
    return [n for n in products if n not in reasons], reasons, reached
