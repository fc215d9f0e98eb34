"""Which layers cost too much fidelity: simulated one by one in a single session, then left in float worst first."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import runtime
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.noise import noise
from onnxslim.passes.int8.prepare import Prepared
from onnxslim.probe import Switched
from onnxslim.restoring import FEWEST, Judge, keep
from onnxslim.results import Told
from onnxslim.units import Kind

# A layer in float costs its MACs and the conversion of its inputs and outputs: so many MACs per element, and at least.
MACS_PER_ELEMENT, MACS_PER_LAYER = 64, 1e6
# What lies between integer layers also costs a change of layout on either side: so many times the conversion.
CUT = 16


def restore(
    model: ir.Model, ready: Prepared, held_out: Data, ctx: Context, fidelity: float, exact: ir.Model | None = None
) -> tuple[Prepared, dict[str, str], float]:
    """What stays on integers so that noise is at most 1 - ``fidelity``, the other products with the reason, the noise.

    Noise is the difference from what ``exact`` computes, where layers of ``model`` are on integers already. Products
    leave in the order of noise per cost, and so does what lies between them: where one sum or activation has no range
    that suits it, the layers around it can stay.
    """
    everything = ready.choose(ready.products)
    names = [n for n in ready.units if n in everything]
    between = [n for n in names if ready.units[n].kind is not Kind.PRODUCT]
    told = Told(model, ctx.threads)
    switched = Switched(told.model, ready.plan(everything), ctx.threads)
    in_float = None if exact is None else runtime.load(told.of(exact), threads=ctx.threads)

    def run(feed: dict[str, np.ndarray], chosen: Collection[str]) -> list[np.ndarray]:
        if chosen or in_float is None:
            return switched(feed, chosen)
        return runtime.arrays(runtime.run(in_float, feed))

    budget = 1 - fidelity if fidelity else float("inf")
    judge = Judge(run, held_out, ready.work, ctx, budget, told.exact)
    judge.hardest_first(everything)

    def price(name: str) -> float:
        unit = ready.units[name]
        elements = sum(ready.sizes.get(v, 0.0) for v in (*unit.inputs, *unit.outputs))
        cut = 1 if unit.kind is Kind.PRODUCT else CUT
        return ready.macs.get(name, 0) + cut * MACS_PER_ELEMENT * elements + MACS_PER_LAYER

    def only(names: Collection[str]) -> Prepared:
        barred = frozenset(between).difference(names)
        return dataclasses.replace(ready, products=[n for n in ready.products if n in names], barred=barred)

    def noise_of(names: Sequence[str]) -> float:
        part = only(names)
        return judge.noise(part.choose(part.products))

    kept = keep(names, budget, noise_of, judge.rank, price)
    reasons = {
        n: f"in int8 it takes about {lost:.2%} of an output's variance"
        for n, lost in kept.restored.items()
        if n not in between
    }
    return only(kept.names), reasons, kept.noise


def kernel_noise(model: ir.Model, data: Data, ctx: Context) -> float:
    """Noise of the outputs of an int8 ``model`` on integer kernels, against what its pairs say.

    Without ONNX Runtime's optimizations every pair is computed as it stands, and products in float.
    """
    told = Told(model, ctx.threads).model
    exact, real = (runtime.load(told, threads=ctx.threads, optimize=optimize) for optimize in (False, True))
    pairs = []
    for feed in data.spread(FEWEST).feeds():
        want, got = (runtime.arrays(runtime.run(runner, feed)) for runner in (exact, real))
        pairs.append((want, got))
    return noise(pairs)
