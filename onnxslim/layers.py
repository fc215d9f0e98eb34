"""The layers of a model, the same layer in another version of it, and what each costs in both.

A layer is a node that multiplies (`onnxslim.cost`), together with what follows it alone: a chain of nodes in which each
is the only reader of the one before and keeps the shape (normalization, bias, activation). Folding and fusing move the
border between a node and its chain, but neither the chain nor the names of its nodes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim import cost, runtime
from onnxslim.errors import ModelError
from onnxslim.graph import attribute, constant, only_user

Feeds = Sequence[Mapping[str, np.ndarray]]
_CHAIN = 6
# Nodes that store a value in another form; the value is the same.
_FORMS = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast"})


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer: its node, and the values of its chain in order, the node's own first."""

    node: ir.Node
    values: tuple[ir.Value, ...]

    @property
    def name(self) -> str:
        """The name of the node, else of its output."""
        return self.node.name or str(self.node.outputs[0].name)

    @property
    def names(self) -> set[str]:
        """What a profile may call a kernel of this layer."""
        nodes = [p for v in self.values if (p := v.producer()) is not None]
        return {n.name for n in nodes if n.name} | {v.name for v in self.values if v.name}


def find(model: ir.Model) -> dict[str, Layer]:
    """Layers of the main graph by name, in its order."""
    found = {}
    for node in model.graph:
        if cost.counts(node):
            layer = Layer(node, tuple(_chain(node.outputs[0])))
            found[layer.name] = layer
    return found


def _chain(value: ir.Value) -> list[ir.Value]:
    chain = [value]
    while len(chain) < _CHAIN:
        user = only_user(chain[-1])
        if user is None or cost.counts(user) or len(user.outputs) != 1 or chain[-1].is_graph_output():
            break
        if any(v is not None and v is not chain[-1] and v.const_value is None for v in user.inputs):
            break  # it reads something else as well
        chain.append(user.outputs[0])
    return chain


def stored_bits(layer: Layer) -> int | None:
    """Bits of one element of the layer's weight as the file stores it; None where the layer has none."""
    if layer.node.op_type == "MatMulNBits":
        return int(attribute(layer.node, "bits", 4))
    for value in layer.node.inputs[1:]:
        while value is not None and (producer := value.producer()) is not None and producer.op_type in _FORMS:
            value = producer.inputs[0]
        if value is not None and value.const_value is not None:
            return int(value.const_value.dtype.bitwidth)
    return None


def weight(layer: Layer) -> np.ndarray | None:
    """The layer's weight in real numbers: stored integers times their scale; None where it has none."""
    for value in layer.node.inputs[1:]:
        if value is None:
            continue
        found = _real(value)
        if found is not None and found.ndim > 1:
            return found
    return None


def _real(value: ir.Value) -> np.ndarray | None:
    producer = value.producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        array = constant(value)
        return array.astype(np.float32) if array is not None and array.dtype.kind in "fV" else None
    stored, scale = constant(producer.inputs[0]), constant(producer.inputs[1])
    if stored is None or scale is None:
        return None
    zero = constant(producer.inputs[2]) if len(producer.inputs) > 2 else None
    axis = producer.attributes.get_int("axis", 1)
    shape = [-1 if k == axis % stored.ndim else 1 for k in range(stored.ndim)] if scale.size > 1 else []
    if scale.ndim > 1:  # blocks along an axis: the histogram of the stored integers would mislead
        return None
    shifted = stored.astype(np.float32) - (0 if zero is None else zero.astype(np.float32).reshape(shape))
    return shifted * scale.astype(np.float32).reshape(shape)


def costs(model: ir.Model, feeds: Feeds, *, threads: int = 0) -> dict[str, dict[str, Any]]:
    """What each layer of ``model`` costs, by name.

    Keys: ``operator``, ``macs``, ``bytes``, ``bits`` (of a stored weight), ``channels`` (of the output), ``ms`` (the
    median of a pass, by ONNX Runtime's profile on the CPU; None where its kernel cannot be told from others).
    """
    feed = feeds[0] if feeds else {}
    table = {row.name: row for row in cost.analyze(model, feed).table}
    times = runtime.profile(model, feeds[:1], threads=threads) if feeds else {}
    layers = find(model)
    found = {}
    spent_by = _spent(model, layers, times)
    for name, layer in layers.items():
        row = table.get(name)
        shape = row.output if row is not None else None
        found[name] = {
            "operator": layer.node.op_type,
            "macs": row.macs if row is not None else None,
            "bytes": _stored_bytes(layer),
            "bits": stored_bits(layer),
            "channels": _channels(layer, shape),
            "ms": spent_by.get(name),
        }
    return found


def _spent(model: ir.Model, layers: Mapping[str, Layer], times: Mapping[str, float]) -> dict[str, float]:
    """Milliseconds by layer. A kernel may also have taken in the sum behind the layer, and bears the name of that."""
    found = {}
    known: set[str] = set()
    for name, layer in layers.items():
        spent = [times[n] for n in layer.names if n in times]
        known |= layer.names
        if spent:
            found[name] = sum(spent)
    for node in model.graph:
        names = {node.name or "", *(v.name or "" for v in node.outputs)} - known
        spent = [times[n] for n in names if n in times]
        if spent and not cost.counts(node):
            hidden = [n for n in _sources(node, layers) if n not in found]
            if len(hidden) == 1:
                found[hidden[0]] = sum(spent)
    return found


def _stored_bytes(layer: Layer) -> int:
    total = 0
    for value in layer.node.inputs:
        while value is not None and (producer := value.producer()) is not None and producer.op_type in _FORMS:
            value = producer.inputs[0]
        if value is not None and value.const_value is not None:
            total += value.const_value.nbytes
    return total


def _channels(layer: Layer, shape: Sequence[int] | None) -> int | None:
    """Axis 1 of images, the last axis of everything else."""
    if not shape or len(shape) < 2:
        return None
    return int(shape[1]) if "Conv" in layer.node.op_type else int(shape[-1])


class _Pair:
    """Running sums over samples for two values of one shape, for each channel on axis ``axis``."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._sums: np.ndarray = np.zeros((6, 1))
        self.peak = 0.0

    def add(self, want: np.ndarray, got: np.ndarray) -> None:
        """Take in one sample; elements that are not finite in both are left out."""
        wide = [np.moveaxis(np.atleast_1d(v).astype(np.float64), self._axis, 0) for v in (want, got)]
        a, b = (v.reshape(v.shape[0], -1) for v in wide)
        finite = np.isfinite(a) & np.isfinite(b)
        a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        sums = np.array([finite.sum(1), a.sum(1), b.sum(1), (a * a).sum(1), (b * b).sum(1), (a * b).sum(1)])
        self._sums = self._sums + sums if self._sums.shape == sums.shape else sums
        self.peak = max(self.peak, float(np.abs(b - a).max(initial=0.0)))

    @property
    def relative(self) -> float:
        """‖got - want‖ / ‖want‖."""
        _, _, _, aa, bb, ab = self._sums.sum(1)
        return math.sqrt(max(0.0, aa + bb - 2 * ab) / aa) if aa else math.sqrt(bb)

    @property
    def unexplained(self) -> float:
        """What is left of it when each channel of ``got`` may be scaled and shifted, relative to the spread of want."""
        count, a, b, aa, bb, ab = self._sums
        count = np.maximum(count, 1)
        spread_a, spread_b, both = aa - a * a / count, bb - b * b / count, ab - a * b / count
        explained = np.divide(both * both, spread_b, out=np.zeros_like(both), where=spread_b > 1e-12 * bb)
        whole = spread_a.sum()
        return math.sqrt(max(0.0, float(whole - explained.sum())) / whole) if whole > 0 else 0.0


def errors(original: ir.Model, other: ir.Model, feeds: Feeds, *, threads: int = 0) -> list[dict[str, Any]]:
    """How far each layer of ``other`` is from the same layer of ``original``, in the order of the graph.

    Layers are the same when their nodes have the same name. Folding moves work into a node; the value compared with is
    therefore that of the original's chain which the output is nearest to. Passes also move scales and biases from one
    layer to another, which makes values differ that mean the same.

    Per layer: ``layer``, ``operator``, ``compared_with`` (a value of the original), ``relative_l2``, ``max_abs``,
    ``error`` (the part of the spread that no scale and shift of each channel explains), and ``added``: the part of it
    that its input layers do not have yet, sqrt(error² - error of the worst input²). Layers of another shape (pruned)
    are left out. The runtime cannot fuse across the values that are read here.
    """
    ours, theirs = find(original), find(other)
    pairs = {name: (ours[name], theirs[name]) for name in theirs if name in ours}
    wanted = {str(v.name) for layer, _ in pairs.values() for v in layer.values if v.name}
    read = {str(twin.values[0].name) for _, twin in pairs.values()}
    sums: dict[str, dict[str, _Pair]] = {name: {} for name in pairs}
    left = runtime.tap(original, wanted, feeds, threads=threads)
    right = runtime.tap(other, read, feeds, threads=threads)
    for want, got in zip(left, right, strict=True) if pairs else ():
        for name, (layer, twin) in pairs.items():
            value = got[str(twin.values[0].name)]
            axis = 1 if "Conv" in layer.node.op_type else value.ndim - 1
            for candidate in layer.values:
                target = want[str(candidate.name)]
                if target.shape == value.shape and target.dtype.kind == "f" and value.dtype.kind == "f":
                    sums[name].setdefault(str(candidate.name), _Pair(max(axis, 0))).add(target, value)
    rows = []
    found: dict[str, float] = {}
    for name, (layer, twin) in pairs.items():
        if not sums[name]:
            continue
        best = min(sums[name], key=lambda value: (round(sums[name][value].unexplained, 9), sums[name][value].relative))
        found[name] = sums[name][best].unexplained
        before = max((found[n] for n in _sources(twin.node, theirs) if n in found), default=0.0)
        rows.append(
            {
                "layer": name,
                "operator": layer.node.op_type,
                "compared_with": best,
                "relative_l2": sums[name][best].relative,
                "max_abs": sums[name][best].peak,
                "error": found[name],
                "added": math.sqrt(max(0.0, found[name] ** 2 - before**2)),
            }
        )
    return rows


def _sources(node: ir.Node, among: Mapping[str, Layer]) -> set[str]:
    """Names of the layers whose values reach ``node`` without passing another one."""
    by_node = {item.node: name for name, item in among.items()}
    found: set[str] = set()
    pending = [v for v in node.inputs if v is not None]
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        producer = value.producer()
        if value in seen or producer is None:
            continue
        seen.add(value)
        if producer in by_node:
            found.add(by_node[producer])
        else:
            pending += [v for v in producer.inputs if v is not None]
    return found


def joined(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per layer of either model: ``layer``, ``operator``, ``before`` and ``after`` (None where it is not)."""
    names = list(dict.fromkeys((*before, *after)))
    return [
        {
            "layer": name,
            "operator": (after.get(name) or before[name])["operator"],
            "before": before.get(name),
            "after": after.get(name),
        }
        for name in names
    ]


def histogram(values: np.ndarray, bins: int = 60) -> dict[str, Any]:
    """Counts of finite ``values`` in equal bins from the least to the largest: ``low``, ``high``, ``counts``."""
    finite = values[np.isfinite(values)].ravel()
    if not finite.size:
        return {"low": 0.0, "high": 0.0, "counts": []}
    counts, edges = np.histogram(finite.astype(np.float64), bins)
    return {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}


def histograms(
    original: ir.Model, other: ir.Model, names: Sequence[str], feeds: Feeds, *, threads: int = 0
) -> list[dict[str, Any]]:
    """Weights and outputs of the layers ``names`` in both models: ``layer``, ``kind``, ``before``, ``after``."""
    both = [find(original), find(other)]
    rows: list[dict[str, Any]] = []
    outputs: list[dict[str, np.ndarray]] = []
    for model, layers in zip((original, other), both, strict=True):
        wanted = {name: str(layers[name].values[0].name) for name in names if name in layers}
        try:
            (tapped,) = runtime.tap(model, wanted.values(), feeds[:1], threads=threads) if wanted and feeds else ({},)
        except ModelError:  # a value that the runtime cannot give out
            tapped = {}
        outputs.append({name: tapped[value] for name, value in wanted.items() if value in tapped})
    for name in names:
        weights = [weight(layers[name]) if name in layers else None for layers in both]
        for kind, pair in (("weights", weights), ("outputs", [o.get(name) for o in outputs])):
            shown = [None if a is None else histogram(np.asarray(a)) for a in pair]
            if any(shown):
                rows.append({"layer": name, "kind": kind, "before": shown[0], "after": shown[1]})
    return rows
