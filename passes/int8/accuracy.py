"""Which layers cost too much fidelity: simulated one by one in a single session, then left in float worst first."""

from __future__ import annotations

import onnx_ir as ir

from onnxslim import runtime
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.passes.int8.prepare import Prepared
from onnxslim.probe import Switched, noise
from onnxslim.restoring import FEWEST, Judge, keep

# A layer in float costs its MACs and the conversion of its inputs and outputs: so many MACs per element, and at least.
MACS_PER_ELEMENT, MACS_PER_LAYER = 64, 1e6


def restore(
    model: ir.Model, ready: Prepared, held_out: Data, ctx: Context, fidelity: float
) -> tuple[list[str], dict[str, str], float]:
    """Products that stay on integers so that noise is at most 1 - ``fidelity``, the others with the reason, the noise.

    Layers leave in the order of noise per cost.
    """
    products = list(ready.products)
    switched = Switched(model, ready.plan(ready.choose(products)), ctx.threads)
    judge = Judge(switched, held_out, sum(ready.macs.values()), ctx)
    judge.hardest_first(ready.choose(products))

    def price(name: str) -> float:
        unit = ready.units[name]
        elements = sum(ready.sizes.get(v, 0.0) for v in (*unit.inputs, *unit.outputs))
        return ready.macs[name] + MACS_PER_ELEMENT * elements + MACS_PER_LAYER

    budget = 1 - fidelity if fidelity else float("inf")
    kept = keep(products, budget, lambda names: judge.noise(ready.choose(names)), judge.rank, price)
    reasons = {n: f"in int8 it alone takes {lost:.2%} of an output's variance" for n, lost in kept.restored.items()}
    return kept.names, reasons, kept.noise


def kernel_noise(model: ir.Model, data: Data, ctx: Context) -> float:
    """Noise of the outputs of an int8 ``model`` on integer kernels, against what its pairs say.

    Without ONNX Runtime's optimizations every pair is computed as it stands, and products in float.
    """
    exact, real = (runtime.load(model, threads=ctx.threads, optimize=optimize) for optimize in (False, True))
    pairs = []
    for feed in data.spread(FEWEST).feeds():
        want, got = (runtime.arrays(runtime.run(runner, feed)) for runner in (exact, real))
        pairs.append((want, got))
    return noise(pairs)
