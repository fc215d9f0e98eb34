"""Elementwise arithmetic that amounts to a known activation function, as the operator of that name.

A cone of elementwise nodes with scalar constants is a function of one real variable. It is recognized by what it
computes, not by how: a few values tell which function of the table, and which parameters, it could be, and
`onnxslim.passes.fuse.intervals` then proves that the two agree for every number. A constant factor may be left over.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.passes.fuse import intervals as iv
from onnxslim.passes.fuse import points
from onnxslim.passes.fuse.arithmetic import OPERATORS
from onnxslim.passes.fuse.cones import Cone, cones
from onnxslim.passes.fuse.intervals import Array, Jet
from onnxslim.passes.fuse.known import KNOWN, PROBES, Known, Parameters
from onnxslim.passes.fuse.work import Work

# Nodes of the longest decomposition in use, with some to spare.
LARGEST = 14
# Relative error of one operation, largest number.
FORMATS = {ir.DataType.FLOAT: (2.0**-24, 3.4028234e38), ir.DataType.FLOAT16: (2.0**-11, 65504.0)}
# Arithmetic of these alone is no activation function.
AFFINE = ("Add", "Sub", "Neg")


@dataclasses.dataclass(frozen=True)
class Found:
    """``factor`` times the function ``known`` with ``parameters``."""

    known: Known
    parameters: Parameters
    factor: float = 1.0

    def __call__(self, x: Jet) -> Jet:
        result = self.known.evaluate(x, **self.parameters)
        return result if self.factor == 1.0 else result * x.constant(self.factor)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The result of an earlier step, or the variable (-1); no number, so that none is taken for it in a cache."""

    step: int


@dataclasses.dataclass(frozen=True)
class Step:
    """One node: its operator, its attributes, and operands (what came before, or a constant)."""

    op_type: str
    operands: tuple[Earlier | float | None, ...]
    attributes: tuple[tuple[str, Any], ...]


def fuse_functions(work: Work) -> None:
    """Replace every cone that is an activation function, the largest of those that end at the same node."""
    order: dict[ir.Node, float] = {node: k for k, node in enumerate(work.model.graph.all_nodes())}
    for node in work.nodes():
        if g.is_op(node, *OPERATORS):
            _fuse_at(work, node, order)


def _fuse_at(work: Work, root: ir.Node, order: dict[ir.Node, float]) -> None:
    dtype = root.outputs[0].dtype
    if dtype is None or dtype not in FORMATS:
        return
    # One node that is another operator, for the sake of those that runtimes fuse with a convolution.
    extremum = g.is_op(root, "Max", "Min")
    best: tuple[Cone, Found] | None = None
    for cone in cones(root, OPERATORS, order, LARGEST):
        if len(cone.nodes) > 1 or extremum:
            found = _recognize(work, cone, dtype)
            if found is not None and (best is None or found.factor == 1.0 or best[1].factor != 1.0):
                best = (cone, found)
    if best is None:
        return
    cone, found = best
    spelled = found.known.since > work.newest
    nodes = 1 + spelled + (found.factor != 1.0)
    if spelled:
        # The factor may still find its way into weights. What is spelled like this already stays.
        pays = nodes <= len(cone.nodes) and not all(g.is_op(node, "HardSigmoid", "Mul") for node in cone.nodes)
    else:
        pays = nodes < len(cone.nodes) or (nodes == len(cone.nodes) and extremum)
    if pays:
        work.require(0 if spelled else found.known.since)
        *before, last = _rewrite(work, root, cone.leaf, found)
        order[last] = order[root]
        order.update({node: order[root] - 0.5 + 0.1 * k for k, node in enumerate(before)})


def _rewrite(work: Work, root: ir.Node, leaf: ir.Value, found: Found) -> list[ir.Node]:
    dtype = root.outputs[0].dtype
    assert dtype is not None
    inputs: list[ir.Value | None] = [leaf]
    attributes = dict(found.parameters)
    if found.known.op_type == "Clip":
        inputs += [work.constant(np.array(attributes.pop(name), dtype.numpy())) for name in ("low", "high")]
    if found.known.since > work.newest:
        # Before there was HardSwish, x HardSigmoid(x / 6 + 1 / 2), which runtimes fuse with a convolution all the same.
        gate = work.insert("HardSigmoid", inputs, root, {"alpha": 1 / 6, "beta": 0.5})
        nodes = [gate, work.insert("Mul", [leaf, gate.outputs[0]], root)]
    else:
        nodes = [work.insert(found.known.op_type, inputs, root, attributes)]
    if found.factor != 1.0:
        factor = work.constant(np.array(found.factor, dtype.numpy()))
        nodes.append(work.insert("Mul", [nodes[-1].outputs[0], factor], root))
        work.scaled = True
    work.replace(root, nodes[-1])
    work.done[found.known.op_type] += 1
    return nodes


def _recognize(work: Work, cone: Cone, dtype: ir.DataType) -> Found | None:
    if all(g.is_op(node, *AFFINE) for node in cone.nodes):
        return None
    steps = _steps(cone)
    found = identify(steps, dtype) if steps is not None else None
    if found is None or (found.known.since > work.newest and found.known.op_type != "HardSwish"):
        return None
    return found


@functools.lru_cache(maxsize=1 << 16)
def identify(steps: tuple[Step, ...], dtype: ir.DataType) -> Found | None:
    """The known function that ``steps`` compute, proven, or None."""
    eps, most = FORMATS[dtype]

    def f(x: Jet) -> Jet:
        return _evaluate(steps, x)

    with np.errstate(all="ignore"):
        given = points.at(PROBES, f, eps, most)
        for known in KNOWN:
            for factor in (1.0, _factor(known, given.mid)) if known.scalable else (1.0,):
                found = _fitted(known, given, factor)
                if found is not None and iv.agree(f, found, eps=eps, most=most):
                    return found
    return None


def _factor(known: Known, values: Array) -> float:
    """What the function would have to be multiplied with to give ``values``."""
    parameters = known.fit(values)
    if parameters is None:
        return 1.0
    ratio = float(values[-1] / _values(known, tuple(parameters.items()))[-1])
    nearest = float(np.round(ratio, 5))
    return nearest if abs(ratio - nearest) < 1e-6 * abs(ratio) else ratio


def _fitted(known: Known, given: Jet, factor: float) -> Found | None:
    """``known`` with parameters read off ``given``, when the two agree at all probes."""
    if factor == 0:
        return None
    parameters = known.fit(given.mid / factor)
    if parameters is None:
        return None
    values = factor * _values(known, tuple(parameters.items()))
    near = np.abs(values - given.mid) <= 64 * given.eps * np.maximum(1.0, np.abs(given.mid))
    return Found(known, parameters, factor) if bool(np.all(near | given.lost)) else None


@functools.lru_cache(maxsize=256)
def _values(known: Known, parameters: tuple[tuple[str, float | str], ...]) -> Array:
    """The function at `PROBES`."""
    return points.at(PROBES, lambda x: known.evaluate(x, **dict(parameters)), 0.0, np.inf).mid


def _steps(cone: Cone) -> tuple[Step, ...] | None:
    """The nodes of ``cone`` as a program, or None when a constant is no scalar, or one that could add axes."""
    position: dict[ir.Value, int] = {cone.leaf: -1}
    rank = len(g.known_shape(cone.leaf) or ())
    steps: list[Step] = []
    for node in cone.nodes:
        operands: list[Earlier | float | None] = []
        for value in node.inputs:
            operand = (
                None if value is None else _scalar(value, rank) if g.is_constant(value) else Earlier(position[value])
            )
            if operand is None and value is not None:
                return None
            operands.append(operand)
        attributes = tuple(sorted((a.name, g.attribute(node, a.name)) for a in node.attributes.values()))
        if any(isinstance(value, list) for _, value in attributes):
            return None
        position[node.outputs[0]] = len(steps)
        steps.append(Step(node.op_type, tuple(operands), attributes))
    return tuple(steps)


def _scalar(value: ir.Value, rank: int) -> float | None:
    """The number in a constant of one element and no more than ``rank`` axes."""
    tensor = value.const_value
    if tensor is None or tensor.size != 1 or len(tuple(tensor.shape)) > rank:
        return None
    array = g.constant(value)
    assert array is not None
    number = float(array.reshape(()))
    return number if not np.isnan(number) else None


def _evaluate(steps: tuple[Step, ...], x: Jet) -> Jet:
    values: list[Jet] = []
    for step in steps:
        operands = [o if not isinstance(o, Earlier) else x if o.step < 0 else values[o.step] for o in step.operands]
        values.append(OPERATORS[step.op_type](x, operands, dict(step.attributes)))
    return values[-1]
