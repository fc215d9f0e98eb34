"""Arithmetic around means of the last axes that amounts to a normalization, as the operator of that name.

    LayerNormalization     y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * scale + bias
    RMSNormalization       y = x / sqrt(mean(x^2) + eps) * scale
    InstanceNormalization  the first over all axes behind the second, with scale and bias along the second

A cone of sums, products, quotients, roots and means is an algebraic function of the data, and two of those are equal
when they are equal at random points. So the cone is evaluated in float64 on random data, from so large that eps does
not matter to so small that it decides; eps, scale and bias are read off, and the operator must give the same numbers.
There are more points than constants to read off: through the values at one of them goes every function that has a
scale of its own for each element.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.passes.fuse.cones import Cone, cones
from onnxslim.passes.fuse.work import Work

# Nodes of the longest decomposition in use, with casts and some to spare.
LARGEST = 18
# What the operator and the cone may differ by in float64, relative to the largest value.
CLOSE = 1e-9
# Data of this size makes any eps disappear.
HUGE = 1e6
# Points at which cone and operator are compared; the first alone would determine the scale.
POINTS = 2
# Larger tensors are not evaluated.
ELEMENTS = 1 << 22
HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclasses.dataclass(frozen=True)
class Kind:
    """A normalization: its operator, since when there is one, and whether it subtracts the mean and adds a bias."""

    op_type: str
    since: int
    centred: bool


LAYER = Kind("LayerNormalization", 17, True)
RMS = Kind("RMSNormalization", 23, False)
INSTANCE = Kind("InstanceNormalization", 6, True)


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """Constants that make an operator compute what a cone computes; they broadcast over the data.

    ``bias`` is None when it is zero.
    """

    kind: Kind
    axis: int
    epsilon: float
    scale: Array
    bias: Array | None


def fuse_norms(work: Work) -> None:
    """Replace every cone that is a normalization, the largest of those that end at the same node."""
    order: dict[ir.Node, float] = {node: k for k, node in enumerate(work.model.graph.all_nodes())}
    # From the end, so that scale and bias are part of the first cone that is found.
    for node in list(work.nodes())[::-1]:
        if node.graph is not None and g.is_op(node, "Add", "Sub", "Mul", "Div", "Cast"):
            _fuse_at(work, node, order)


def _fuse_at(work: Work, root: ir.Node, order: dict[ir.Node, float]) -> None:
    best: tuple[Cone, Fit] | None = None
    for cone in cones(root, OPERATORS, order, LARGEST):
        fit = _recognize(cone, work.newest)
        if fit is not None:
            best = (cone, fit)
    if best is None:
        return
    cone, fit = best
    assert cone.root.dtype is not None
    element = cone.root.dtype.numpy()
    flat = (-1,) if fit.kind is INSTANCE else cone_sizes(fit)
    inputs = [cone.leaf, work.constant(fit.scale.astype(element).reshape(flat))]
    attributes: dict[str, float | int] = {"epsilon": fit.epsilon}
    if fit.kind is not INSTANCE:
        attributes["axis"] = fit.axis
    if fit.bias is not None or fit.kind is INSTANCE:
        bias = fit.bias if fit.bias is not None else 0 * fit.scale
        inputs.append(work.constant(bias.astype(element).reshape(flat)))
    work.require(fit.kind.since)
    work.replace(root, work.insert(fit.kind.op_type, inputs, root, attributes))
    work.done[fit.kind.op_type] += 1


def cone_sizes(fit: Fit) -> tuple[int, ...]:
    """The shape of scale and bias of a LayerNormalization: the sizes of the normalized axes."""
    return fit.scale.shape[fit.axis - fit.scale.ndim :]


def _recognize(cone: Cone, newest: int) -> Fit | None:
    """The normalization that ``cone`` computes, or None."""
    shape, dtype = g.known_shape(cone.leaf), cone.leaf.dtype
    reductions = [node for node in cone.nodes if node.op_type.startswith("Reduce")]
    if not shape or cone.root.dtype is not dtype or dtype not in {ir.DataType.FLOAT, *HALVES}:
        return None
    # Into another type than its own the data goes to be computed with more digits, not to lose some.
    precise = {ir.DataType.FLOAT, ir.DataType.DOUBLE, dtype}
    if any(g.is_op(node, "Cast") and g.attribute(node, "to", 0) not in precise for node in cone.nodes):
        return None
    reduced = {_axes(node, len(shape)) for node in reductions}
    axis = min((min(axes) for axes in reduced if axes), default=0)
    if reduced != {tuple(range(axis, len(shape)))} or axis < 1:
        return None
    # One row: the others are computed alike, unless a constant varies along them, which gives another shape.
    rows = (1,) * axis
    last = shape[axis:]
    sizes = (*rows, *(d for d in last if d is not None))
    fits = []
    if len(sizes) == len(shape) and math.prod(sizes) <= ELEMENTS and math.prod(sizes[axis:]) >= 3:
        fits += [(kind, sizes) for kind in (LAYER, RMS) if kind.since <= newest]
    channels = shape[1] if axis == 2 and dtype is ir.DataType.FLOAT else None
    if channels is not None and all(node.op_type == "ReduceMean" for node in reductions):
        # How many elements there are does not matter then: other sizes than the real ones will do. Images first, as
        # the scale of a layer has the size of one.
        images = (INSTANCE, (1, channels, *(3 + k for k in range(len(last)))))
        fits.insert(0 if len(last) > 1 else len(fits), images)
    return next((fit for kind, sizes in fits if (fit := _fit(cone, kind, sizes, axis)) is not None), None)


def _fit(cone: Cone, kind: Kind, sizes: tuple[int, ...], axis: int) -> Fit | None:
    """``kind`` over the axes from ``axis`` on with constants read off ``cone``, when that is what the cone computes."""
    # Axes from the last on: behind that of the points.
    reduced = tuple(range(axis - len(sizes), 0))
    same = (0, *reduced) if kind is INSTANCE else (0,)
    rng = np.random.default_rng(0)
    data = rng.standard_normal((POINTS, *sizes)) + rng.standard_normal((POINTS, *sizes[:axis], *(1,) * len(reduced)))
    with np.errstate(all="ignore"):
        # Far above any eps: y = scale n(x) + bias with n(-x) = -n(x).
        above, below = _at(cone, HUGE * data), _at(cone, -HUGE * data)
        if above is None or below is None:
            return None
        bias = ((above + below) / 2).mean(same, keepdims=True)
        unit = normalize(data, reduced, 0.0, kind.centred)
        scale = np.sum((above - below) / 2 * unit, same, keepdims=True) / np.sum(unit * unit, same, keepdims=True)
        # Small: (y - bias) = scale centre / sqrt(var + eps).
        small = _at(cone, 1e-3 * data)
        if small is None:
            return None
        centre = 1e-3 * (data - data.mean(reduced, keepdims=True) if kind.centred else data)
        weight = scale * centre
        gain = np.sum((small - bias) * weight, reduced) / np.sum(weight * weight, reduced)
        epsilon = float(np.float32(np.median(1 / gain**2 - np.mean(centre**2, reduced))))
        # What float64 leaves of none.
        epsilon = 0.0 if abs(epsilon) < 1e-16 else epsilon
        if not 0 <= epsilon < 1:  # NaN where scale or bias are
            return None
        # Down to where eps is as large as the variance: without any, to rows of one number, which are NaN then.
        for factor in (HUGE, 1.0, 1e-2, 1e-3, math.sqrt(epsilon)):
            want = _at(cone, factor * data)
            got = normalize(factor * data, reduced, epsilon, kind.centred) * scale + bias
            if want is None or not np.allclose(
                got, want, rtol=0, atol=tolerance(factor) * np.nanmax(np.abs(want), initial=0), equal_nan=True
            ):
                return None
    if np.all(np.abs(bias) <= CLOSE * np.abs(scale).max()):
        return Fit(kind, axis, epsilon, scale[0], None)
    return Fit(kind, axis, epsilon, scale[0], bias[0]) if kind.centred else None


def tolerance(factor: float) -> float:
    """`CLOSE`, where eps matters wide enough for one that float32 has rounded."""
    return CLOSE if factor >= 1 else 2.0**-23


def normalize(x: Array, axes: tuple[int, ...], epsilon: float, centred: bool) -> Array:
    """``x`` over the root of the mean of its squares along ``axes``, without its mean when ``centred``."""
    if centred:
        x = x - x.mean(axes, keepdims=True)
    return x / np.sqrt((x * x).mean(axes, keepdims=True) + epsilon)


def _at(cone: Cone, points: Array) -> Array | None:
    """What ``cone`` makes of every one of ``points``; None when that cannot be computed, or has another shape."""
    values = [evaluate(cone, x) for x in points]
    same = [y for y in values if y is not None and y.shape == points.shape[1:]]
    return np.stack(same) if len(same) == len(values) else None


def evaluate(cone: Cone, x: Array) -> Array | None:
    """The root of ``cone`` for the leaf ``x``, in float64; None when it cannot be computed."""
    values: dict[ir.Value, Array] = {cone.leaf: x}
    for node in cone.nodes:
        operands = []
        for value in node.inputs:
            if value is None:
                return None
            if value not in values:
                array = g.constant(value)
                if array is None:
                    return None
                values[value] = array.astype(np.float64)
            operands.append(values[value])
        try:
            result = OPERATORS[node.op_type](node, operands)
        except ValueError:  # a constant that fits the real sizes of the data, not those of this test
            return None
        if result is None or result.size > ELEMENTS:
            return None
        values[node.outputs[0]] = result
    return values[cone.root]


def _axes(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """The axes that a reduction with keepdims reduces, ascending, or None when they are not known."""
    axes = g.attribute(node, "axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        array = g.constant(node.inputs[1])
        axes = array.reshape(-1).tolist() if array is not None else None
    if axes is None or not g.attribute(node, "keepdims", 1):
        return None
    return tuple(sorted(axis % rank for axis in axes))


def _reduction(f: Callable[..., Array]) -> Operator:
    def compute(node: ir.Node, operands: list[Array]) -> Array | None:
        axes = _axes(node, operands[0].ndim)
        return f(operands[0], axis=axes, keepdims=True) if axes else None

    return compute


Operator = Callable[[ir.Node, list[Array]], "Array | None"]
OPERATORS: dict[str, Operator] = {
    "Add": lambda node, v: v[0] + v[1],
    "Sub": lambda node, v: v[0] - v[1],
    "Mul": lambda node, v: v[0] * v[1],
    "Div": lambda node, v: v[0] / v[1],
    "Pow": lambda node, v: v[0] ** v[1],
    "Sqrt": lambda node, v: np.sqrt(v[0]),
    "Reciprocal": lambda node, v: 1 / v[0],
    "Neg": lambda node, v: -v[0],
    "Cast": lambda node, v: v[0],
    "ReduceMean": _reduction(np.mean),
    "ReduceSum": _reduction(np.sum),
    "ReduceSumSquare": _reduction(lambda x, axis, keepdims: np.sum(x * x, axis=axis, keepdims=keepdims)),
    "ReduceL2": _reduction(lambda x, axis, keepdims: np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims))),
}
