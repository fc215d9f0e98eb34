"""Which layers lose time on integers: found in two kernel profiles, decided by whole-model timings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import qdq, runtime
from onnxslim.choice import fastest, slower_layer
from onnxslim.contract import Context
from onnxslim.passes.int8.prepare import Prepared
from onnxslim.passes.int8.remainder import Remainder
from onnxslim.units import Unit, connect, regions, stored_values

Feeds = Sequence[Mapping[str, np.ndarray]]


@dataclasses.dataclass
class Found:
    """The fastest choice of products, the others with the reason, and the speed over float of every candidate."""

    products: list[str]
    reasons: dict[str, str]
    speeds: dict[str, float]


def search(model: ir.Model, ready: Prepared, feeds: Feeds, remainder: Remainder, ctx: Context) -> Found:
    """Find the products of ``ready`` that are faster on integers than in float.

    Two rounds drop what the kernel times say loses, conversions included; then the float model and every candidate
    are timed in turn, and the fastest stays. With nothing faster than float, nothing stays on integers. All models are
    timed with what is in float fused.
    """
    ep, products = ready.profile.ep, ready.products
    # Other providers run most of a model as one node: only the whole can be timed.
    float_times = _float_times(model, ready, feeds, remainder, ctx) if ep == "cpu" else {}
    candidates: dict[str, list[str]] = {"all": products}
    reasons: dict[str, str] = {}
    models = {"all": remainder.fuse(insert(model, ready, products))}
    kept = products
    for name in ("restored", "restored twice") if ep == "cpu" else ():
        times = runtime.profile(models[next(reversed(models))], feeds, threads=ctx.threads)
        losing = _losing(ready, kept, float_times, times)
        if not losing or len(losing) == len(kept):
            break
        reasons.update(losing)
        kept = [n for n in kept if n not in losing]
        candidates[name], models[name] = kept, remainder.fuse(insert(model, ready, kept))
    choice = fastest(remainder.model, models, feeds, ctx, ep=ep)
    if choice.name is None:
        return Found([], dict.fromkeys(products, choice.refusal), choice.speeds)
    gone = set(products) - set(candidates[choice.name])
    return Found(candidates[choice.name], {n: reasons[n] for n in products if n in gone}, choice.speeds)


def insert(model: ir.Model, ready: Prepared, products: Collection[str]) -> ir.Model:
    """A copy of ``model`` with ``products`` on integers."""
    clone = model.clone()
    qdq.insert(clone, ready.plan(ready.choose(products)))
    return clone


def _float_times(
    model: ir.Model, ready: Prepared, feeds: Feeds, remainder: Remainder, ctx: Context
) -> dict[str, float]:
    """Milliseconds of every node in float, by the names it has in ``model``; of the fused model as far as it has them.

    A product that became part of another one takes the time that it took by itself.
    """
    times = runtime.profile(remainder.model, feeds, threads=ctx.threads)
    merged = [n for n in ready.products if not _spent(ready.units[n], times)]
    if merged and remainder.done:
        plain = runtime.profile(model, feeds, threads=ctx.threads)
        names = {name for n in merged for name in _names(ready.units[n])}
        times |= {name: plain[name] for name in names if name in plain}
    return times


def _names(unit: Unit) -> set[str]:
    """What a profile may call the nodes of ``unit``: their own names, or those of their results."""
    return {n.name or "" for n in unit.nodes} | {v.name or "" for n in unit.nodes for v in n.outputs}


def _spent(unit: Unit, times: Mapping[str, float]) -> float:
    return sum(times.get(name, 0.0) for name in _names(unit))


def _losing(
    ready: Prepared, products: Sequence[str], float_times: Mapping[str, float], times: Mapping[str, float]
) -> dict[str, str]:
    """Products whose time on integers exceeds their time in float, with the conversions either way."""
    chosen = ready.choose(products)
    stored = set(stored_values(ready.units, chosen))
    writer, readers = connect(ready.units)
    rate = {op: _per_element(ready, times, stored, op) for op in ("QuantizeLinear", "DequantizeLinear")}
    losing: dict[str, str] = {}

    for name in products:
        unit = ready.units[name]
        now, then = _spent(unit, times), _spent(unit, float_times)
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
        reason = slower_layer(then, now)
        if reason is not None:
            losing[name] = reason
    # What loses by itself is in float when the rest of its region is judged, which then starts and ends at it.
    alone = set(losing)
    for group in regions(ready.units, ready.choose([n for n in products if n not in alone])):
        inside = [n for n in products if n in group]
        before = sum(_spent(ready.units[n], float_times) for n in group)
        after = sum(_spent(ready.units[n], times) for n in group)
        for value in stored_values(ready.units, group):
            size = ready.sizes.get(value, 0.0)
            cut = {
                "QuantizeLinear": writer.get(value) in alone,
                "DequantizeLinear": any(r in alone for r in readers.get(value, ())) and writer.get(value) in group,
            }
            after += sum(times.get(f"{value}_{op}", rate[op] * size if cut[op] else 0.0) for op in rate)
        reason = slower_layer(before, after)
        if reason is not None:
            losing.update(dict.fromkeys(inside, f"its region is {reason}"))
    return losing


def _per_element(ready: Prepared, times: Mapping[str, float], stored: Collection[str], op: str) -> float:
    """Milliseconds to convert one element, from the conversions that the profile shows (else a usual figure)."""
    seen = [(times[f"{v}_{op}"], ready.sizes.get(v, 0.0)) for v in stored if f"{v}_{op}" in times]
    elements = sum(size for _, size in seen)
    return sum(t for t, _ in seen) / elements if elements else 2e-7
