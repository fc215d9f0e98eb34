"""Two ways to store a tensor otherwise, and the operators that do not mind.

A `Change` is a Transpose or Reshape that stands in a graph, from an *outer* form to an *inner* one. An operator between
such a node and its opposite can work on the outer form as well, when its result is the same element by element, bit for
bit.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Hashable

import numpy as np
import onnx_ir as ir

from onnxslim.graph import add_constant, add_node, attribute, constant, is_constant, is_op, opset, set_attribute
from onnxslim.shape_elementwise import BROADCAST
from onnxslim.shape_moves import pad_amounts, slice_bounds
from onnxslim.shape_rules import Shape, axis_of
from onnxslim.shapes import Shapes
from onnxslim.views import add_view, can_view, is_view

_UNARY_NAMES = """
    Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish
    Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
    Softsign Sqrt Swish Tan Tanh ThresholdedRelu
"""
UNARY = frozenset(_UNARY_NAMES.split())
_BROADCAST = frozenset({*BROADCAST.split(), "PRelu", "Where"})
# Sums would be added up in another order, which is another rounding.
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMin"})
# Where the axis is by default.
_AXIS = {"Concat": 1, "Split": 0}
# A weight that other nodes read too is stored a second time when it is transposed: small ones only.
_COPIED_BYTES = 4096


def tensors(node: ir.Node) -> list[ir.Value]:
    """Inputs that change form together with the output."""
    inputs = node.inputs if node.op_type in _BROADCAST or node.op_type == "Concat" else node.inputs[:1]
    return [v for v in inputs if v is not None and not is_constant(v)]


class Change(abc.ABC):
    """One change of form, wherever it stands in the main graph of ``model``."""

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self.top = model.graph
        self.shapes = shapes
        self.opset = opset(model)

    @property
    def can_enter(self) -> bool:
        """True when a new node that leads in can be written."""
        return True

    @property
    def can_leave(self) -> bool:
        """True when a new node that leads out can be written."""
        return True

    @abc.abstractmethod
    def leads_in(self, node: ir.Node) -> bool:
        """True for a node that takes the outer form and gives the inner one."""

    @abc.abstractmethod
    def leads_out(self, node: ir.Node) -> bool:
        """True for the opposite node."""

    @abc.abstractmethod
    def outer(self, shape: Shape) -> Shape:
        """The outer form of a shape."""

    @abc.abstractmethod
    def declared(self, shape: ir.Shape) -> ir.Shape | None:
        """The outer form of a declared shape."""

    @abc.abstractmethod
    def enter(self, value: ir.Value, after: ir.Node) -> ir.Value:
        """A new node that gives the inner form of ``value``."""

    @abc.abstractmethod
    def leave(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """A new node that gives the outer form of ``value``."""

    @abc.abstractmethod
    def merges(self, node: ir.Node | None) -> bool:
        """True for a node that becomes one with a node of this change beside it, when nothing else reads in between."""

    @abc.abstractmethod
    def accepts(self, node: ir.Node) -> bool:
        """True for an operator of a kind that can work on the outer form; tensors and outputs have been checked."""

    @abc.abstractmethod
    def fits(self, shape: Shape) -> bool:
        """True for a shape that has an outer form."""

    @abc.abstractmethod
    def rewrite(self, node: ir.Node) -> None:
        """Bring attributes and constant inputs of ``node`` into the outer form."""

    def indifferent(self, node: ir.Node) -> bool:
        """True when ``node`` can work on the outer form."""
        if node.domain not in ("", "ai.onnx") or node.graph is not self.top or not node.inputs:
            return False
        shapes = [self.shapes.shape(v) for v in (*tensors(node), *node.outputs)]
        return all(s is not None and self.fits(s) for s in shapes) and bool(tensors(node)) and self.accepts(node)

    def constants(self, node: ir.Node) -> list[int]:
        """Positions of the constant operands of a broadcasting operator."""
        if node.op_type not in _BROADCAST:
            return []
        return [k for k, v in enumerate(node.inputs) if v is not None and is_constant(v)]


class Permutation(Change):
    """A Transpose: the inner axis i is the outer axis ``perm[i]``."""

    def __init__(self, model: ir.Model, shapes: Shapes, perm: tuple[int, ...]) -> None:
        super().__init__(model, shapes)
        self.perm = perm
        self.inverse = tuple(int(k) for k in np.argsort(perm))

    def leads_in(self, node: ir.Node) -> bool:
        return permutation(node, self.shapes) == self.perm

    def leads_out(self, node: ir.Node) -> bool:
        return permutation(node, self.shapes) == self.inverse

    def fits(self, shape: Shape) -> bool:
        return len(shape) == len(self.perm)

    def outer(self, shape: Shape) -> Shape:
        return tuple(shape[k] for k in self.inverse)

    def declared(self, shape: ir.Shape) -> ir.Shape | None:
        return ir.Shape([shape[k] for k in self.inverse])

    def enter(self, value: ir.Value, after: ir.Node) -> ir.Value:
        return add_node(self.top, "Transpose", [value], after=after, attributes={"perm": list(self.perm)}).outputs[0]

    def leave(self, value: ir.Value, before: ir.Node) -> ir.Value:
        perm = list(self.inverse)
        return add_node(self.top, "Transpose", [value], before=before, attributes={"perm": perm}).outputs[0]

    def merges(self, node: ir.Node | None) -> bool:
        return is_op(node, "Transpose")

    def accepts(self, node: ir.Node) -> bool:
        if node.op_type in UNARY:
            return True
        if node.op_type in _BROADCAST:
            return self.opset >= 7 and all(self._permutable(node.inputs[k]) for k in self.constants(node))
        if node.op_type == "Concat":
            return len(tensors(node)) == len(node.inputs)
        if not all(v is None or is_constant(v) for v in node.inputs[1:]):
            return False
        call = self.shapes.call(node)
        if node.op_type in _REDUCTIONS:
            return bool(attribute(node, "keepdims", 1)) and bool(call.param("axes", 1))
        if node.op_type == "Slice":
            return self.opset >= 10 and slice_bounds(call) is not None
        if node.op_type == "Split":
            return True
        if node.op_type == "Pad":
            plain = len(node.inputs) < 4 or node.inputs[3] is None
            return self.opset >= 11 and plain and pad_amounts(call) is not None
        return False

    def _permutable(self, value: ir.Value | None) -> bool:
        tensor = None if value is None else value.const_value
        if value is None or tensor is None or len(tensor.shape) > len(self.perm):
            return False
        return tensor.size <= 1 or tensor.nbytes <= _COPIED_BYTES or len(value.uses()) == 1

    def rewrite(self, node: ir.Node) -> None:
        rank = len(self.perm)
        for k in self.constants(node):
            self._turn_constant(node, k)
        if node.op_type in ("Concat", "Split"):
            set_attribute(node, "axis", self.perm[axis_of(attribute(node, "axis", _AXIS[node.op_type]), rank)])
        elif node.op_type in _REDUCTIONS:
            axes = [self.perm[axis_of(a, rank)] for a in self.shapes.call(node).param("axes", 1) or ()]
            if len(node.inputs) > 1 and node.inputs[1] is not None:
                node.replace_input_with(1, self._weight(node, "axes", axes))
            else:
                set_attribute(node, "axes", axes)
        elif node.op_type == "Slice":
            parts = slice_bounds(self.shapes.call(node)) or {}
            table = [(start, end, self.perm[axis], step) for axis, (start, end, step) in parts.items()]
            node.resize_inputs(5)
            for k, column in enumerate(zip(*table, strict=True), 1):
                node.replace_input_with(k, self._weight(node, "slice", [int(v) for v in column]))
        elif node.op_type == "Pad":
            amounts = pad_amounts(self.shapes.call(node)) or {}
            pads = np.zeros((2, rank), np.int64)
            for axis, (low, high) in amounts.items():
                pads[:, self.perm[axis]] = int(low), int(high)  # type: ignore[arg-type]
            node.replace_input_with(1, self._weight(node, "pads", pads.reshape(-1).tolist()))

    def _weight(self, node: ir.Node, what: str, numbers: list[int]) -> ir.Value:
        return add_constant(self.top, f"{node.outputs[0].name}_{what}", np.array(numbers, np.int64))

    def _turn_constant(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        array = constant(value)
        # One number meets every element whatever their order.
        if value is not None and array is not None and array.size > 1:
            full = array.reshape((1,) * (len(self.perm) - array.ndim) + array.shape).transpose(self.inverse)
            node.replace_input_with(index, add_constant(self.top, f"{value.name}_turned", np.ascontiguousarray(full)))


class Reshaping(Change):
    """A Reshape (or Flatten, Squeeze, Unsqueeze) between two shapes; only elementwise operators without broadcasting
    can stand between it and its opposite."""

    def __init__(self, model: ir.Model, shapes: Shapes, outer: Shape, inner: Shape) -> None:
        super().__init__(model, shapes)
        self._outer, self._inner = outer, inner

    @property
    def can_enter(self) -> bool:
        return can_view(self._outer, self._inner)

    @property
    def can_leave(self) -> bool:
        return can_view(self._inner, self._outer)

    def _is(self, node: ir.Node, source: Shape, result: Shape) -> bool:
        if not is_view(node, self.shapes) or self.shapes.shape(node.outputs[0]) != result:
            return False
        return self.shapes.shape(node.inputs[0]) == source

    def leads_in(self, node: ir.Node) -> bool:
        return self._is(node, self._outer, self._inner)

    def leads_out(self, node: ir.Node) -> bool:
        return self._is(node, self._inner, self._outer)

    def fits(self, shape: Shape) -> bool:
        return shape == self._inner

    def outer(self, shape: Shape) -> Shape:
        return self._outer

    def declared(self, shape: ir.Shape) -> ir.Shape | None:
        return None

    def enter(self, value: ir.Value, after: ir.Node) -> ir.Value:
        return add_view(value, self._outer, self._inner, self.opset, self.top, after=after)

    def leave(self, value: ir.Value, before: ir.Node) -> ir.Value:
        return add_view(value, self._inner, self._outer, self.opset, self.top, before=before)

    def merges(self, node: ir.Node | None) -> bool:
        return False  # two views are one only where a target made of numbers says so

    def accepts(self, node: ir.Node) -> bool:
        if node.op_type in UNARY:
            return True
        weights = [node.inputs[k] for k in self.constants(node)]
        single = all(v is not None and v.const_value is not None and v.const_value.size == 1 for v in weights)
        return node.op_type in _BROADCAST and self.opset >= 7 and single

    def rewrite(self, node: ir.Node) -> None:
        for k in self.constants(node):
            value = node.inputs[k]
            array = constant(value)
            if value is not None and array is not None and array.ndim > len(self._outer):
                node.replace_input_with(k, add_constant(self.top, f"{value.name}_scalar", array.reshape(())))


def permutation(node: ir.Node, shapes: Shapes) -> tuple[int, ...] | None:
    """The axes of a Transpose, None for other nodes."""
    if not is_op(node, "Transpose"):
        return None
    perm, shape = attribute(node, "perm"), shapes.shape(node.inputs[0])
    if perm is None:
        return None if shape is None else tuple(range(len(shape)))[::-1]
    return tuple(perm)


def changes(model: ir.Model, shapes: Shapes) -> list[tuple[Change, list[ir.Node]]]:
    """Every change of form that two nodes of the main graph make or undo, with these nodes."""
    found: dict[Hashable, tuple[Change, list[ir.Node]]] = {}
    for node in model.graph:
        for key, make in _forms(node, model, shapes):
            if key not in found:
                found[key] = (make(), [])
            found[key][1].append(node)
    return [(change, nodes) for change, nodes in found.values() if len(nodes) > 1]


def _forms(node: ir.Node, model: ir.Model, shapes: Shapes) -> list[tuple[Hashable, Callable[[], Change]]]:
    """The change that ``node`` makes and the one that it undoes, by a key."""
    perm = permutation(node, shapes)
    if perm is not None:
        perms = dict.fromkeys((perm, tuple(int(k) for k in np.argsort(perm))))
        return [(p, functools.partial(Permutation, model, shapes, p)) for p in perms]
    if not is_view(node, shapes):
        return []
    one, two = shapes.shape(node.inputs[0]), shapes.shape(node.outputs[0])
    if one is None or two is None or one == two:
        return []
    pairs = ((one, two), (two, one))
    return [(("view", *pair), functools.partial(Reshaping, model, shapes, *pair)) for pair in pairs]
