"""A constant factor moves back to the weights that its value is computed from: ``c (W x + b) = (c W) x + c b``.

Between the weights and the factor stand nodes that are homogeneous of degree one, ``f(c x) = c f(x)``: data movement,
sums of what is scaled alike, products with something that is not scaled. Attention divides the product of queries and
keys by the root of their size; the factor ends up in the weight of the one or the other, however far away.

Exact when everything that reads a value which changes is scaled in turn, once: a value that something else reads too,
or that a product reads twice, ends the search. Numbers that leave the range of their type, too.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import Linear, view
from onnxslim.passes.fold.absorb import place, record, rewrite
from onnxslim.passes.fold.affine import Affine, affine, large, protected
from onnxslim.passes.fold.edit import faithful
from onnxslim.passes.fold.work import Work

# Nodes that may stand between the factor and the weights.
FARTHEST = 40
# Operators whose first input alone is data, every element of which comes out unchanged, or not at all.
MOVES = (
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Identity",
    "Slice",
    "Gather",
    "Expand",
    "Neg",
    "Split",
)
# Half precision leaves its range so soon that factors above one stay where they are.
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass
class _Plan:
    """What is scaled: values, the nodes between them, and at the ends linear operators and constants of nodes.

    Of a product with a constant, ``constants_first`` scales the constant.
    """

    constants_first: bool
    values: dict[ir.Value, None]
    nodes: dict[ir.Node, None]
    linears: list[Linear]
    constants: list[tuple[ir.Node, int]]

    def copy(self) -> _Plan:
        return _Plan(
            self.constants_first, dict(self.values), dict(self.nodes), list(self.linears), list(self.constants)
        )


def absorb_scales(work: Work) -> None:
    """Move every Mul and Div by one constant number back to weights."""
    for node in work.nodes():
        if g.is_op(node, "Mul", "Div") and not protected(node):
            step = affine(node, work.weights.read)
            if step is not None and step.shape in ((), (1,) * len(step.shape)):
                _absorb(work, node, step)


def _absorb(work: Work, node: ir.Node, step: Affine) -> None:
    factor = float(step.scale.reshape(()))
    rank = g.known_shape(step.x)
    if not factor or len(step.shape) > len(rank or ()):
        return
    if step.x.dtype in HALVES and abs(factor) > 1:
        return
    # Constants of products that several layers share cannot change; the data can, unless something else reads it.
    for constants_first in (False, True):
        plan = _scale(step.x, _Plan(constants_first, {}, {node: None}, [], []))
        if plan is not None and _closed(plan) and _commit(work, node, step.x, factor, plan):
            return


def _commit(work: Work, node: ir.Node, x: ir.Value, factor: float, plan: _Plan) -> bool:
    edit = work.edit()
    edit.drop([node])
    edit.redirect(node.outputs[0], x)
    changes = []
    for linear in plan.linears:
        change = rewrite(work, linear, None, Affine((), linear.y, np.array(factor), np.array(0.0), 0.0))
        if isinstance(change, str):
            return False
        changes.append((change, record(work, edit, change)))
    for user, index in plan.constants:
        value = user.inputs[index]
        assert value is not None and value.dtype is not None
        constant = work.weights.read(value)
        if g.is_op(user, "Add", "Sub", "Sum") and np.max(np.abs(constant), initial=0.0) >= large(value.dtype):
            return False  # it may round what it is added to: not homogeneous
        scaled = factor * constant
        if not faithful(scaled, value.dtype):
            return False
        edit.give(user, index, scaled, value.dtype)
    if edit.refusal() is not None:
        return False
    work.done["scale"] += 1
    constants = edit.commit()
    for change, position in changes:
        place(work, change, constants, position)
    work.bypass(node.outputs[0], x)
    edit.finish()
    return True


def _scale(value: ir.Value, plan: _Plan) -> _Plan | None:
    """``plan`` with all that must be scaled for ``value`` to be, or None where that cannot be."""
    if value in plan.values:
        return plan
    node = value.producer()
    if node is None or len(plan.nodes) > FARTHEST:
        return None
    linear = view(node)
    if linear is not None:
        plan = plan.copy()
        plan.values[linear.y] = None
        plan.nodes[node] = None
        plan.linears.append(linear)
        return plan
    for indices in _choices(node, plan.constants_first):
        attempt: _Plan | None = plan.copy()
        assert attempt is not None
        attempt.values.update(dict.fromkeys(node.outputs))
        attempt.nodes[node] = None
        for index in indices:
            operand = node.inputs[index]
            if operand is None or attempt is None:
                attempt = None
            elif not g.is_constant(operand):
                attempt = _scale(operand, attempt)
            else:
                attempt.constants.append((node, index))
        if attempt is not None:
            return attempt
    return None


def _choices(node: ir.Node, constants_first: bool) -> list[tuple[int, ...]]:
    """Sets of inputs of ``node`` such that scaling them scales its result."""
    if g.is_op(node, *MOVES) or g.is_op(node, "Div"):
        return [(0,)]
    if g.is_op(node, "Add", "Sub", "Concat", "Sum"):
        return [tuple(range(len(node.inputs)))]
    if g.is_op(node, "Mul", "MatMul"):
        left, right = node.inputs
        if g.is_constant(left) or g.is_constant(right):
            constant = int(g.is_constant(right))
            return [(constant,)] if constants_first else [(1 - constant,)]
        return [(0,), (1,)]
    return []


def _closed(plan: _Plan) -> bool:
    """True when all that reads a scaled value is part of ``plan``, and nothing is scaled twice."""
    for value in plan.values:
        if value.is_graph_output() or any(use.node not in plan.nodes for use in value.uses()):
            return False
    if any(linear.x in plan.values for linear in plan.linears):
        return False
    for node in plan.nodes:
        scaled = sum(v in plan.values for v in node.inputs) + sum(user is node for user, _ in plan.constants)
        if g.is_op(node, "Mul", "MatMul", "Div") and scaled > 1:
            return False
    return True
