"""Channels of one tensor brought to similar ranges without changing the function: centring and equalization.

Centring. A tensor has one range for all its channels, so channels far from zero push each other into few levels. Where
what writes a tensor can subtract a constant m_c from channel c (a bias) and what reads it can make up for it (a bias
again: b + W m), the model computes the same function. Zero padding would not follow, so readers must not pad; an Add
passes the sum of both shifts on. The m_c are the means over the calibration data, which are additive as well.

Equalization. Channels that are small beside the largest one are stored in few levels. Where every operator
that writes a tensor can divide channel c by r_c (rows of a weight, and the bias) and every operator that reads it can
multiply by r_c (the columns of a weight), the model computes the same function for any r > 0. Relu, average and maximum
pooling commute with a positive factor, and the operands and the result of an Add must share r, so values are grouped
into classes that are scaled together; anything else that touches a value fixes its scale.

With a_c the largest magnitude of channel c, the choices are r_c = (a_c / max a)^alpha; alpha is the one that makes the
expected error of the readers smallest, relative to their signal (Nagel et al., Data-Free Quantization, 2019, and Xiao
et al., SmoothQuant, 2023, use alpha = 1/2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.calibration import collect
from onnxslim.contract import Context
from onnxslim.data import Data

ALPHAS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
# A channel that is almost silent would need factors that float32 cannot carry exactly enough.
SMALLEST = 1e-4


class Channels:
    """Extremes, mean and mean square of every channel of a tensor, each (channels,), over all samples.

    Positions where some channel is NaN or infinite are left out.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.low = self.high = self.total = self.squares = np.zeros(0)
        self.count = 0

    def update(self, array: np.ndarray) -> None:
        rows = np.moveaxis(array, self.axis, 0).reshape(array.shape[self.axis], -1)
        known = np.isfinite(rows)
        if not known.all():
            rows = rows[:, known.all(0)]
        if not rows.shape[1]:
            return
        if not self.count:
            self.low, self.high = np.full(len(rows), np.inf), np.full(len(rows), -np.inf)
            self.total, self.squares = np.zeros(len(rows)), np.zeros(len(rows))
        self.low, self.high = np.minimum(self.low, rows.min(1)), np.maximum(self.high, rows.max(1))
        self.total = self.total + rows.sum(1, dtype=np.float64)
        self.squares = self.squares + np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
        self.count += rows.shape[1]

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel."""
        return self.total / max(self.count, 1)

    @property
    def power(self) -> np.ndarray:
        """Mean square of each channel."""
        return self.squares / max(self.count, 1)

    @property
    def peak(self) -> np.ndarray:
        """Largest magnitude of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def shifted(self, shift: np.ndarray) -> Channels:
        """The statistics of the tensor after ``shift`` (channels,) was subtracted."""
        other = Channels(self.axis)
        other.low, other.high, other.count = self.low - shift, self.high - shift, self.count
        other.total = self.total - self.count * shift
        other.squares = self.squares - 2 * shift * self.total + self.count * np.square(shift)
        return other


@dataclasses.dataclass
class Class:
    """Values scaled together: ``axis`` and number of channels, the nodes that write them, the nodes that read them.

    ``writers`` and ``readers`` hold (name of the node, name of the value).
    """

    values: list[str]
    axis: int
    channels: int
    writers: list[tuple[str, str]]
    readers: list[tuple[str, str]]


def find_classes(model: ir.Model) -> list[Class]:
    """Classes of values of the main graph whose channels may be scaled."""
    return _Finder(model).classes()


class _Finder:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.parent: dict[str, str] = {}
        self.fixed: set[str] = set()
        self.axis: dict[str, int] = {}
        self.channels: dict[str, int] = {}
        self.writers: dict[str, str] = {}
        self.readers: dict[str, list[str]] = {}

    def classes(self) -> list[Class]:
        graph = self.model.graph
        for value in (*graph.inputs, *graph.outputs):
            self._fix(value)
        main = set(graph)
        for node in graph:
            self._visit(node)
            for value in node.outputs:
                if any(use.node not in main for use in value.uses()):
                    self._fix(value)
        groups: dict[str, list[str]] = {}
        for name in self.parent:
            groups.setdefault(self._root(name), []).append(name)
        blocked = {self._root(name) for name in self.fixed}
        found = []
        for root, values in groups.items():
            axes = {self.axis[v] for v in values if v in self.axis}
            sizes = {self.channels[v] for v in values if v in self.channels}
            readers = [(n, v) for v in values for n in self.readers.get(v, ())]
            writers = [(self.writers[v], v) for v in values if v in self.writers]
            if root not in blocked and len(axes) == 1 and len(sizes) == 1 and readers and writers:
                found.append(Class(values, axes.pop(), sizes.pop(), writers, readers))
        return found

    def _visit(self, node: ir.Node) -> None:
        source = next((v for v in node.inputs if v is not None), None)
        if g.is_op(node, "Conv", "Gemm", "MatMul") and source is not None and _plain(node):
            weight = g.known_shape(node.inputs[1]) or ()
            group = int(g.attribute(node, "group", 1))
            if node.op_type == "Conv":
                wide, narrow, axis = int(weight[1] or 0) * group, int(weight[0] or 0), 1
            else:
                transposed = bool(g.attribute(node, "transB", 0))
                narrow, wide = (weight[0], weight[1]) if transposed else (weight[1], weight[0])  # type: ignore[assignment]
                axis = len(g.known_shape(source) or ()) - 1
            self._ends(node, source, wide, axis, reads=True)
            self._ends(node, node.outputs[0], narrow, axis, reads=False)
        elif g.is_op(node, "Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity"):
            assert source is not None
            self._join(source, node.outputs[0])
            for extra in node.outputs[1:]:
                self._fix(extra)
        elif g.is_op(node, "Add") and not any(g.is_constant(v) for v in node.inputs):
            first, second = node.inputs
            shapes = {g.known_shape(v) for v in (first, second)}
            if first is None or second is None or None in shapes or len(shapes) != 1:
                self._fix(first, second, *node.outputs)
            else:
                self._join(first, second)
                self._join(first, node.outputs[0])
        else:
            self._fix(*node.inputs, *node.outputs)

    def _ends(self, node: ir.Node, value: ir.Value, channels: int, axis: int, *, reads: bool) -> None:
        name = value.name or ""
        self._root(name)
        if axis < 0 or self.axis.setdefault(name, axis) != axis or self.channels.setdefault(name, channels) != channels:
            self._fix(value)
        if reads:
            self.readers.setdefault(name, []).append(node.name or "")
        else:
            self.writers[name] = node.name or ""

    def _root(self, name: str) -> str:
        self.parent.setdefault(name, name)
        while self.parent[name] != name:
            self.parent[name] = self.parent[self.parent[name]]
            name = self.parent[name]
        return name

    def _join(self, first: ir.Value, second: ir.Value) -> None:
        self.parent[self._root(first.name or "")] = self._root(second.name or "")

    def _fix(self, *values: ir.Value | None) -> None:
        for value in values:
            if value is not None and not g.is_constant(value):
                self._root(value.name or "")
                self.fixed.add(value.name or "")


def find_centres(model: ir.Model, channels: Mapping[str, Channels]) -> dict[str, np.ndarray]:
    """What may be subtracted from the channels of each value, (channels,), by name: its mean where that is possible."""
    shifts: dict[str, np.ndarray] = {}
    fixed = {v.name or "" for v in (*model.graph.inputs, *model.graph.outputs)}
    nodes = list(model.graph)
    main = set(nodes)
    for node in reversed(nodes):
        for value in node.outputs:
            if not all(use.node in main and _makes_up(use.node, use.idx, fixed) for use in value.uses()):
                fixed.add(value.name or "")
    for node in nodes:
        name = node.outputs[0].name or "" if node.outputs else ""
        if name in fixed:
            continue
        if g.is_op(node, "Add"):
            parts = [shifts[v.name] for v in node.inputs if v is not None and v.name in shifts]
            if parts:
                shifts[name] = np.sum(parts, axis=0)
        elif _biased(node) and name in channels and channels[name].count:
            shifts[name] = channels[name].mean
    return shifts


def _biased(node: ir.Node) -> bool:
    factors = (g.attribute(node, name, 1.0) for name in ("alpha", "beta"))
    return g.is_op(node, "Conv", "Gemm") and _plain(node) and all(factor == 1.0 for factor in factors)


def _makes_up(node: ir.Node, index: int, fixed: set[str]) -> bool:
    """Whether a reader computes the same from a shifted input after its own constants were changed."""
    if g.is_op(node, "Add"):
        first, second = (g.known_shape(v) for v in node.inputs)
        constant = any(g.is_constant(v) for v in node.inputs)
        return not constant and first == second and first is not None and node.outputs[0].name not in fixed
    if not _biased(node) or index != 0:
        return False
    unpadded = not any(g.attribute(node, "pads", [])) and g.attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    return node.op_type == "Gemm" or unpadded


def centre(model: ir.Model, shifts: Mapping[str, np.ndarray]) -> None:
    """Subtract ``shifts`` (see `find_centres`) from the values of ``model`` in place."""
    for node in list(model.graph):
        if not _biased(node):
            continue
        source, output = (v.name or "" if v is not None else "" for v in (node.inputs[0], node.outputs[0]))
        weight = g.constant(node.inputs[1])
        assert weight is not None
        change = np.zeros(weight.shape[_output_axis(node)])
        if source in shifts:
            change = change + _sums(node, weight) @ shifts[source]
        if output in shifts:
            change = change - shifts[output]
        if source in shifts or output in shifts:
            bias = g.constant(node.inputs[2]) if len(node.inputs) > 2 else None
            total = change if bias is None else bias + change
            node.resize_inputs(3)
            hint = f"{node.name}_bias"
            node.replace_input_with(2, g.add_constant(model.graph, hint, total.astype(np.float32)))


def _sums(node: ir.Node, weight: np.ndarray) -> np.ndarray:
    """The weight summed over the window, (outputs, channels): what a constant input gives."""
    if node.op_type != "Conv":
        return weight.astype(np.float64) if _output_axis(node) == 0 else weight.T.astype(np.float64)
    return _spread(weight.reshape(*weight.shape[:2], -1).sum(2, dtype=np.float64), int(g.attribute(node, "group", 1)))


def _plain(node: ir.Node) -> bool:
    """Whether the weight is a float32 matrix or filter of this node alone, and the bias, if any, a constant row."""
    weight = node.inputs[1]
    if (
        weight is None
        or not g.is_constant(weight)
        or weight.dtype != ir.DataType.FLOAT
        or g.is_constant(node.inputs[0])
    ):
        return False
    if len(weight.uses()) != 1 or weight.is_graph_output():
        return False
    rank = len(g.known_shape(weight) or ())
    if node.op_type == "MatMul":
        return rank == 2
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and (not g.is_constant(bias) or len(g.known_shape(bias) or ()) != 1):
        return False
    if node.op_type == "Gemm" and g.attribute(node, "transA", 0):
        return False
    return bias is None or g.known_shape(bias) == ((g.known_shape(weight) or ())[_output_axis(node)],)


def _output_axis(node: ir.Node) -> int:
    if node.op_type == "Conv":
        return 0
    return 0 if g.attribute(node, "transB", 0) else 1


def best_factors(model: ir.Model, found: Class, channels: Mapping[str, Channels]) -> np.ndarray | None:
    """Factors r (channels,) for one class, or None when scaling does not reduce the expected error."""
    nodes = {node.name: node for node in model.graph}
    seen = [channels[v] for v in found.values if v in channels and channels[v].count and channels[v].peak.max() > 0]
    if not seen:
        return None
    peak = np.max([c.peak / c.peak.max() for c in seen], axis=0)
    live = peak > SMALLEST
    best: np.ndarray | None = None
    least = np.inf
    for alpha in ALPHAS:
        factors = np.where(live, np.maximum(peak, SMALLEST) ** alpha, 1.0)
        error = 0.0
        for name, value in found.readers:
            if value in channels and channels[value].count:
                error += _expected(_columns(nodes[name]), channels[value], factors)
        # What leaves the function as it is wins unless scaling pays clearly.
        if error < least * 0.95:
            least, best = error, factors
    return None if best is None or np.ptp(best) == 0 else best


def _columns(node: ir.Node) -> np.ndarray:
    """The weight as (outputs, channels), the largest magnitude over the window; zero where they are not connected."""
    weight = g.constant(node.inputs[1])
    assert weight is not None
    if node.op_type != "Conv":
        return weight if _output_axis(node) == 0 else weight.T
    flat = np.abs(weight).reshape(*weight.shape[:2], -1).max(2, initial=0.0)
    return _spread(flat, int(g.attribute(node, "group", 1)))


def _spread(flat: np.ndarray, group: int) -> np.ndarray:
    """(outputs, inputs / group) of a grouped Conv as (outputs, inputs)."""
    if group == 1:
        return flat
    outputs, width = flat.shape
    wide = np.zeros((outputs, width * group), flat.dtype)
    for row in range(outputs):
        start = row // (outputs // group) * width
        wide[row, start : start + width] = flat[row]
    return wide


def _expected(columns: np.ndarray, seen: Channels, factors: np.ndarray) -> float:
    """Squared error over squared signal of a product, for rounding its input to 255 levels and its rows to 127."""
    squares = seen.power
    power = np.square(columns.astype(np.float64))
    signal = (power * squares).sum(1) + 1e-30
    step = (max((seen.high / factors).max(), 0.0) - min((seen.low / factors).min(), 0.0)) / 255
    from_input = step**2 / 12 * (power * np.square(factors)).sum(1)
    steps = np.abs(columns * factors).max(1) / 127
    connected = columns != 0
    from_weight = np.square(steps) / 12 * (connected * squares / np.square(factors)).sum(1)
    return float(np.sum(from_input + from_weight) / np.sum(signal))


def scale(model: ir.Model, found: Class, factors: np.ndarray) -> None:
    """Scale one class of ``model`` in place: what writes it by 1 / ``factors``, what reads it by ``factors``."""
    nodes = {node.name: node for node in model.graph}
    for name, _ in found.writers:
        node = nodes[name]
        axis = _output_axis(node)
        _scale(model.graph, node, 1, axis, 1 / factors)
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            _scale(model.graph, node, 2, 0, 1 / factors)
    for name, _ in found.readers:
        node = nodes[name]
        group = int(g.attribute(node, "group", 1)) if node.op_type == "Conv" else 1
        if group == 1:
            _scale(model.graph, node, 1, 1 - _output_axis(node), factors)
            continue
        weight = g.constant(node.inputs[1])
        assert weight is not None
        # (outputs, inputs / group, ...): outputs of group k read channels k * inputs / group and on.
        rows = np.repeat(factors.reshape(group, -1), weight.shape[0] // group, axis=0)
        scaled = weight * rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
        node.replace_input_with(1, g.add_constant(model.graph, node.inputs[1].name or "", scaled.astype(np.float32)))  # type: ignore[union-attr]


def _scale(graph: ir.Graph, node: ir.Node, index: int, axis: int, factors: np.ndarray) -> None:
    value = node.inputs[index]
    array = g.constant(value)
    assert value is not None and array is not None
    shape = [1] * array.ndim
    shape[axis] = -1
    scaled = (array * factors.reshape(shape)).astype(np.float32)
    # A new constant: another node may share the old one (equal biases often are one).
    node.replace_input_with(index, g.add_constant(graph, value.name or "scaled", scaled))


def statistics(model: ir.Model) -> dict[str, Channels]:
    """Empty statistics of every value that a product writes or reads, to be filled by one pass over the data."""
    found: dict[str, Channels] = {}
    for node in model.graph:
        if not g.is_op(node, "Conv", "Gemm", "MatMul") or not _plain(node):
            continue
        for value in (node.inputs[0], node.outputs[0]):
            rank = len(g.known_shape(value) or ())
            if value is not None and rank >= 2:
                found[value.name or ""] = Channels(1 if node.op_type == "Conv" else rank - 1)
    return found


def equalize(model: ir.Model, data: Data, ctx: Context) -> dict[str, int]:
    """Centre and equalize ``model`` in place from one pass over ``data``; returns how many values and classes."""
    channels = statistics(model)
    collect(model, {name: [seen] for name, seen in channels.items()}, ctx, data=data, label="equalization")
    shifts = find_centres(model, channels)
    centre(model, shifts)
    moved = {name: seen.shifted(shifts[name]) if name in shifts else seen for name, seen in channels.items()}
    scaled = 0
    for found in find_classes(model):
        factors = best_factors(model, found, moved)
        if factors is not None:
            scale(model, found, factors)
            scaled += 1
    g.remove_dead(model.graph)
    return {"centred": len(shifts), "equalized": scaled}
