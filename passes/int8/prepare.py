"""Everything that int8 needs to know before it chooses layers: ranges, stored weights, bias shifts, sizes, costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import branch_values, calibration, cost, ranges, runtime
from onnxslim.calibration import Histogram
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import constant, in_branches
from onnxslim.probe import Local
from onnxslim.profiles import CPU, Profile
from onnxslim.qdq import Plan
from onnxslim.quantization import QParams, store_weight, weight_params, widen_for_bias
from onnxslim.responses import response
from onnxslim.restoring import FEWEST
from onnxslim.rounding import ROWS, WIDEST, Gram, refine
from onnxslim.saturation import neighbours, overflowing
from onnxslim.units import Kind, Unit, find_units, settle, sources, stored_values

# Samples on which ranges are compared by the error they cause, at most, and the work (`onnxslim.cost`) it may take.
COMPARED, WORK = 8, 4e11


@dataclasses.dataclass
class Prepared:
    """A float model and how each of its units would be stored.

    Attributes:
        units: all units of the model; ``products`` are the names of those that may run on integers.
        sizes: elements per value, averaged over the samples.
        macs: multiply-accumulates per node, those of other products too.
        work: what a run of the model takes (see `onnxslim.cost.Cost`).
        params, weights, shift: see `Plan`.
        methods: how many ranges were taken by each method.
        saturating: products whose sums of two products would not fit into 16 bits, which CPUs without VNNI have.
        narrow: those of them whose weights are kept smaller for that reason, and others that read the same weights.
        profile: the execution provider that is served.
        barred: glue and moves that stay in float.
        guessed: values whose rank only samples show (`observe_ranks`).
    """

    units: dict[str, Unit]
    products: list[str]
    sizes: dict[str, float]
    macs: dict[str, int]
    work: float
    params: dict[str, QParams]
    weights: dict[str, tuple[np.ndarray, QParams]]
    shift: dict[str, np.ndarray]
    methods: dict[str, int]
    saturating: list[str]
    narrow: list[str]
    profile: Profile
    barred: frozenset[str] = frozenset()
    guessed: frozenset[str] = frozenset()

    def choose(self, products: Collection[str]) -> frozenset[str]:
        """``products`` and the glue and moves worth having with them."""
        return settle(self.units, products, self.sizes, self.barred)

    def plan(self, chosen: Collection[str]) -> Plan:
        """The plan that runs ``chosen`` on integers."""
        return Plan(frozenset(chosen), self.params, self.weights, self.shift, self.profile, self.guessed)


def survey(
    model: ir.Model,
    products: Sequence[str],
    data: Data,
    ctx: Context,
    *,
    per_channel: bool,
    profile: Profile = CPU,
    portable: bool = False,
) -> Prepared:
    """Measure ``model`` on ``data`` and decide how every unit would be stored.

    Products whose input never had a finite value are dropped from the result's ``products``.
    """
    units = profile.units(find_units(model)[0])
    wanted = set(products)
    units = {n: u for n, u in units.items() if u.kind is not Kind.PRODUCT or n in wanted}
    owner = sources(units.values())
    names = dict.fromkeys(owner.get(v, v) for v in stored_values(units, units if wanted else ()))
    histograms = {name: Histogram() for name in names}
    first = _sharing(units, [n for n in products if n in units])
    grams = _grams(units, first.values(), max(ROWS // len(data), 16))
    attached: dict[str, list[calibration.Statistic]] = {name: [h] for name, h in histograms.items()}
    for name, leader in first.items():
        if leader in grams:
            attached.setdefault(units[name].inputs[0], []).append(grams[leader])
    if attached:
        calibration.collect(model, attached, ctx, data=data)
    del attached  # the moments take more memory than the model: they are let go of as they are used
    for gram in grams.values():
        gram.finish()
    seen_as = {v.name or "": found[0] for v in _values(model) if v.name in histograms and (found := response(v))}
    options = {
        name: {method: profile.params(*limits) for method, limits in ranges.candidates(h, seen_as.get(name)).items()}
        for name, h in histograms.items()
    }
    units = {n: u for n, u in units.items() if all(options.get(owner.get(v, v), True) for v in (*u.inputs, *u.outputs))}
    kept = [n for n in products if n in units]
    readers: dict[str, list[str]] = {}
    for name in kept:
        readers.setdefault(first[name], []).append(name)

    def store(leader: str, *, narrow: bool = False) -> dict[str, tuple[np.ndarray, QParams]]:
        names = readers[leader]
        sources_of = [owner.get(units[n].inputs[0], units[n].inputs[0]) for n in names]
        steps = [min(float(c.scale) for c in options[source].values()) for source in sources_of]
        gram = grams.get(leader) if portable and not narrow else grams.pop(leader, None)
        return dict.fromkeys(names, _store([units[n] for n in names], per_channel, gram, steps, narrow=narrow))

    weights = {name: found for leader in readers for name, found in store(leader).items()}
    params = {name: found["mse" if "mse" in found else "minmax"] for name, found in options.items() if found}
    counted = cost.analyze(model, data.feed(data[0]))
    work = counted.work * (1 + max(map(len, options.values()), default=0))
    compared = data.spread(int(np.clip(WORK / max(work, 1), FEWEST, COMPARED)))
    shift, methods = _compare(model, kept, weights, options, params, compared, ctx, profile)
    saturating: list[str] = []
    if profile.pairwise:
        chosen = {n: units[n] for n in kept}
        saturating = overflowing(
            model, chosen, weights, {n: params[owner.get(v, v)] for n, v in _reads(chosen)}, ctx, data
        )
    narrow = [n for names in readers.values() if any(n in saturating for n in names) for n in names] if portable else []
    if narrow:
        for leader in dict.fromkeys(first[n] for n in narrow):
            weights.update(store(leader, narrow=True))
        grams.clear()
        shift, methods = _compare(model, kept, weights, options, params, compared, ctx, profile)
    sizes = {n: histograms[o].elements for n in (*names, *owner) if (o := owner.get(n, n)) in histograms}
    table = {row.name: row.macs for row in counted.table}
    return Prepared(
        units, kept, sizes, table, counted.work, params, weights, shift, methods,
        saturating, narrow, profile,
    )  # fmt: skip


def _reads(units: Mapping[str, Unit]) -> list[tuple[str, str]]:
    """Each product with the activation it reads."""
    return [(name, unit.inputs[0]) for name, unit in units.items()]


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(v for node in in_branches(model.graph) for v in node.outputs)]


def observe_ranks(model: ir.Model, data: Data, ctx: Context) -> list[str]:
    """Give values whose type or rank does not follow from the inputs those that one sample shows.

    Returns the names of the values without a rank; `forget_ranks` undoes it, because the rank may differ for other
    inputs. Types may not: behind an operator of another domain they stay. In branches only ranks can be seen.
    """
    values = [v for node in model.graph for v in node.outputs if v.name and v.uses()]
    values += [v for v, _ in branch_values.visible(model) if v.uses()]
    unknown = [v.name for v in values if v.name and v.shape is None]
    untyped = {v.name for v in values if v.type is None}
    if not unknown and not untyped:
        return []
    feeds = [data.feed(data[0])]
    (seen,) = runtime.tap(
        model, dict.fromkeys((*unknown, *sorted(n for n in untyped if n))), feeds, threads=ctx.threads
    )
    for value in values:
        array = seen.get(value.name or "")
        if not isinstance(array, np.ndarray):  # a sequence
            continue
        if value.graph is not model.graph and not array.size:  # in a branch that is not taken
            continue
        if value.shape is None:
            value.shape = ir.Shape([None] * array.ndim)
        if value.name in untyped and array.dtype.kind in "fiub":
            value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    return unknown


def forget_ranks(model: ir.Model, names: Collection[str]) -> None:
    """Remove the shapes that `observe_ranks` wrote."""
    for node in in_branches(model.graph):
        for value in node.outputs:
            if value.name in names:
                value.shape = None


def _compare(
    model: ir.Model,
    products: Sequence[str],
    weights: Mapping[str, tuple[np.ndarray, QParams]],
    options: Mapping[str, Mapping[str, QParams]],
    params: dict[str, QParams],
    data: Data,
    ctx: Context,
    profile: Profile,
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Put the best range of every input of a product into ``params``; returns bias shifts and how often each won.

    The best range is the one with the least error of the products that read the tensor, relative to their results. The
    shift of a product makes up for its mean error per channel, shrunk where samples disagree about it.
    """
    if not products:
        return {}, {}
    local = Local(model, products, weights, options, ctx.threads, profile)
    errors: dict[tuple[str, str], float] = {}
    means: dict[tuple[str, str], list[np.ndarray]] = {}
    for feed in ctx.progress.track(data.feeds(), total=len(data), label="ranges"):
        for name, found in local(feed).items():
            for kind, (error, mean) in found.items():
                key = (local.inputs[name], kind)
                errors[key] = errors.get(key, 0.0) + error
                means.setdefault((name, kind), []).append(mean)
    methods: dict[str, int] = {}
    winner: dict[str, str] = {}
    for owner in local.owners:
        if not any((owner, kind) in errors for kind in options[owner]):  # in a branch that no sample takes
            continue
        best = min(options[owner], key=lambda kind: errors[owner, kind])
        winner[owner], params[owner] = best, options[owner][best]
        methods[best] = methods.get(best, 0) + 1
    shift = {}
    for name in products:
        if (name, winner.get(local.inputs[name])) not in means:
            continue
        seen = np.array(means[name, winner[local.inputs[name]]], np.float64)
        seen = np.where(np.isfinite(seen).all(0), seen, 0)  # a channel that is infinite somewhere has no mean error
        mean, doubt = seen.mean(0), seen.var(0) / len(seen)
        shift[name] = -mean * np.square(mean) / (np.square(mean) + doubt + 1e-30)
    return shift, methods


def _sharing(units: Mapping[str, Unit], products: Sequence[str]) -> dict[str, str]:
    """For each product the first that multiplies by the same weight in the same way: they store it together."""
    found: dict[tuple[object, ...], str] = {}
    result = {}
    for name in products:
        unit = units[name]
        assert unit.weight is not None
        index, axis = unit.weight
        windows = [(a.name, str(a.value)) for a in unit.node.attributes.values()] if unit.op == "Conv" else []
        result[name] = found.setdefault((unit.node.inputs[index], axis, unit.op == "Conv", *sorted(windows)), name)
    return result


def _grams(units: Mapping[str, Unit], products: Collection[str], rows: int) -> dict[str, Gram]:
    """Moments of the inputs of every product that is not too wide for them."""
    found = {}
    for name in dict.fromkeys(products):
        unit = units[name]
        assert unit.weight is not None
        weight = constant(unit.node.inputs[unit.weight[0]])
        assert weight is not None
        width = weight.shape[1 - unit.weight[1]] if unit.op != "Conv" else int(np.prod(weight.shape[1:]))
        if width <= WIDEST:
            found[name] = Gram(unit, weight.shape, rows)
    return found


def _store(
    units: Sequence[Unit], per_channel: bool, gram: Gram | None, steps: Sequence[float], *, narrow: bool
) -> tuple[np.ndarray, QParams]:
    """The stored weight of products that share it, whose inputs are stored with at least ``steps``.

    Args:
        narrow: so that the sum of two products always fits into 16 bits.
    """
    node, place = units[0].node, units[0].weight
    assert place is not None
    index, axis = place
    weight = constant(node.inputs[index])
    assert weight is not None
    pairs = neighbours(node, weight.shape, axis) if narrow else None
    params = weight_params(weight, axis, pairs=pairs, per_channel=per_channel)
    for unit, step in zip(units, steps, strict=True):
        bias = constant(unit.node.inputs[2]) if len(unit.node.inputs) > 2 else None
        if unit.bias is not None:  # a row behind a MatMul is stored as the bias of a Gemm
            bias = next(a for v in unit.bias.inputs if (a := constant(v)) is not None)
        if bias is not None:
            params = widen_for_bias(params, np.broadcast_to(bias.reshape(-1), (weight.shape[axis],)), step)
    stored = store_weight(weight, axis, params, pairs)
    if gram is not None:
        stored = refine(weight, stored, params, gram, axis, pairs)
    return stored, params
