"""Which layers lose time on integers: found in two kernel profiles, decided by whole-model timings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import qdq, runtime
from onnxslim.contract import Context
from onnxslim.passes.int8.prepare import Prepared
from onnxslim.units import connect, regions, stored_values

Feeds = Sequence[Mapping[str, np.ndarray]]
# A layer goes back to float when that is predicted to take less than this share of its time on integers; a candidate
# with fewer integer layers must be faster than one with more by this factor. Both are wider than the noise of timing.
CLEAR, FASTER = 0.9, 1.02
SECONDS = 4.0


@dataclasses.dataclass
class Choice:
    """The fastest choice of products, the others with the reason, and the speed over float of every candidate."""

    products: list[str]
    reasons: dict[str, str]
    speedup: float
    candidates: dict[str, float]


def search(model: ir.Model, ready: Prepared, products: list[str], feeds: Feeds, ctx: Context) -> Choice:
    """Find the products that are faster on integers than in float.

    Two rounds drop what the kernel times say loses, conversions included; then the float model and every candidate
    are timed in turn, and the fastest stays. With nothing faster than float, nothing stays on integers.
    """
    ep = ready.profile.ep
    # Other providers run most of a model as one node: only the whole can be timed.
    float_times = runtime.profile(model, feeds, threads=ctx.threads) if ep == "cpu" else {}
    candidates: dict[str, list[str]] = {"all": products}
    reasons: dict[str, str] = {}
    models = {"all": insert(model, ready, products)}
    kept = products
    for name in ("restored", "restored twice") if ep == "cpu" else ():
        times = runtime.profile(models[next(reversed(models))], feeds, threads=ctx.threads)
        losing = _losing(ready, kept, float_times, times)
        if not losing or len(losing) == len(kept):
            break
        reasons.update(losing)
        kept = [n for n in kept if n not in losing]
        candidates[name], models[name] = kept, insert(model, ready, kept)
    runners = [runtime.load(m, ep=ep, threads=ctx.threads) for m in (model, *models.values())]
    timed = runtime.compare_latency(runners, [feeds] * len(runners), seconds=SECONDS)
    # The fastest tenth of the passes: what other processes take from a busy machine is not the model's.
    speeds = {n: timed.latency[0].p10 / timed.latency[k].p10 for k, n in enumerate(candidates, 1)}
    best = "all"
    for name, speed in speeds.items():
        if speed > speeds[best] * FASTER:
            best = name
    if speeds[best] < 1:
        slower = f"the model is not faster on integers ({speeds[best]:.2f}x at best)"
        return Choice([], dict.fromkeys(products, slower), 1.0, speeds)
    gone = set(products) - set(candidates[best])
    return Choice(candidates[best], {n: reasons[n] for n in products if n in gone}, speeds[best], speeds)


def insert(model: ir.Model, ready: Prepared, products: Collection[str]) -> ir.Model:
    """A copy of ``model`` with ``products`` on integers."""
    clone = model.clone()
    qdq.insert(clone, ready.plan(ready.choose(products)))
    return clone


def _losing(
    ready: Prepared, products: Sequence[str], float_times: Mapping[str, float], times: Mapping[str, float]
) -> dict[str, str]:
    """Products whose time on integers exceeds their time in float, with the conversions either way."""
    chosen = ready.choose(products)
    stored = set(stored_values(ready.units, chosen))
    writer, readers = connect(ready.units)
    rate = {op: _per_element(ready, times, stored, op) for op in ("QuantizeLinear", "DequantizeLinear")}
    losing: dict[str, str] = {}

    def spent(name: str, source: Mapping[str, float]) -> float:
        unit = ready.units[name]
        names = {n.name or "" for n in unit.nodes} | {v.name or "" for n in unit.nodes for v in n.outputs}
        return sum(source.get(n, 0.0) for n in names)

    for name in products:
        unit = ready.units[name]
        now, then = spent(name, times), spent(name, float_times)
        if now == 0 or then == 0:  # merged with something else: only the whole model can tell
            continue
        for value in unit.inputs:
            size = ready.sizes.get(value, 0.0)
            if writer.get(value) in chosen:
                then += rate["DequantizeLinear"] * size
            elif sum(r in chosen for r in readers.get(value, ())) == 1:
                now += times.get(f"{value}_QuantizeLinear", rate["QuantizeLinear"] * size)
        for value in unit.outputs:
            size = ready.sizes.get(value, 0.0)
            if any(r in chosen for r in readers.get(value, ())):
                then += rate["QuantizeLinear"] * size
            elif value in stored:
                now += times.get(f"{value}_DequantizeLinear", rate["DequantizeLinear"] * size)
        if then < now * CLEAR:
            losing[name] = f"slower on integers: {now:.3f} ms, {then:.3f} ms in float"
    for group in regions(ready.units, chosen):
        inside = [n for n in products if n in group and n not in losing]
        before = sum(spent(n, float_times) for n in group)
        conversions = [f"{v}_{op}" for v in stored_values(ready.units, group) for op in rate]
        after = sum(spent(n, times) for n in group) + sum(times.get(c, 0.0) for c in conversions)
        if inside and 0 < before < after * CLEAR:
            losing.update(
                dict.fromkeys(inside, f"its region is slower on integers: {after:.3f} ms, {before:.3f} in float")
            )
    return losing


def _per_element(ready: Prepared, times: Mapping[str, float], stored: Collection[str], op: str) -> float:
    """Milliseconds to convert one element, from the conversions that the profile shows (else a usual figure)."""
    seen = [(times[f"{v}_{op}"], ready.sizes.get(v, 0.0)) for v in stored if f"{v}_{op}" in times]
    elements = sum(size for _, size in seen)
    return sum(t for t, _ in seen) / elements if elements else 2e-7
