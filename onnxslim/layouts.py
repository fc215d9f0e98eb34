"""Transposes pushed through the operators that do not mind, wherever that leaves fewer of them.

An elementwise operator, and one that names its axes, can work on transposed tensors as well. For a permutation p, every
such node is *flipped* (it computes what stood before the Transpose) or not. A tensor that one side makes and the other
side reads costs one Transpose, however many read it; Transposes at the border cost nothing on the flipped side. The
cheapest choice is a minimum cut, so the number of Transposes left is the least there is for that permutation, and
nothing changes unless it falls. The same numbers are computed in another order of storage: the results are the same bit
for bit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxslim.graph import (
    add_constant,
    add_node,
    attribute,
    constant,
    fresh_name,
    is_constant,
    is_op,
    opset,
    replace,
    set_attribute,
)
from onnxslim.mincut import INFINITE, Network
from onnxslim.shape_moves import pad_amounts, slice_bounds
from onnxslim.shape_rules import BROADCAST, Fact, Shape, axis_of
from onnxslim.shapes import Shapes

Perm = tuple[int, ...]

_UNARY_NAMES = """
    Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
    HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin
    Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu
"""
_UNARY = frozenset(_UNARY_NAMES.split())
_BINARY = frozenset({*BROADCAST.split(), "PRelu", "Where"})
# Sums would be added up in another order, which is another rounding.
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMin"})
# A weight that other nodes read too is stored a second time when it is transposed: small ones only.
_COPIED_BYTES = 4096
# Work (edges of the network times Transposes) above which a region is left as it is.
_MAX_WORK = 20_000_000


def remove_transposes(model: ir.Model, shapes: Shapes) -> int:
    """Flip what pays, for every permutation in the main graph; returns the number of Transposes saved."""
    perms = dict.fromkeys(p for node in model.graph if (p := _perm(node, shapes)) is not None)
    return sum(_Search(model, shapes, perm).run() for perm in perms)


def _perm(node: ir.Node, shapes: Shapes) -> Perm | None:
    if not is_op(node, "Transpose"):
        return None
    perm = attribute(node, "perm")
    shape = shapes.shape(node.inputs[0])
    if perm is None:
        return None if shape is None else tuple(range(len(shape)))[::-1]
    return tuple(perm)


class _Search:
    """Regions of flippable nodes around the Transposes of one permutation."""

    def __init__(self, model: ir.Model, shapes: Shapes, perm: Perm) -> None:
        self._top = model.graph
        self._opset = opset(model)
        self._shapes = shapes
        self._perm = perm
        self._inverse = tuple(int(k) for k in np.argsort(perm))
        self._visited: set[ir.Node] = set()

    def run(self) -> int:
        saved = 0
        for node in list(self._top):
            if node.graph is None or _perm(node, self._shapes) != self._perm:
                continue
            for use in list(node.outputs[0].uses()):
                if use.node not in self._visited and self._flippable(use.node):
                    region = self._region(use.node)
                    saved += self._flip(region)
        return saved

    def _region(self, start: ir.Node) -> dict[ir.Node, None]:
        """Flippable nodes connected with ``start`` through tensors of full rank."""
        region = {start: None}
        stack = [start]
        self._visited.add(start)
        while stack:
            node = stack.pop()
            neighbours = [v.producer() for v in self._tensors(node)]
            neighbours += [use.node for v in node.outputs for use in v.uses()]
            for other in neighbours:
                if other is not None and other not in self._visited and self._flippable(other):
                    self._visited.add(other)
                    region[other] = None
                    stack.append(other)
        return region

    def _tensors(self, node: ir.Node) -> list[ir.Value]:
        """Inputs of ``node`` that are transposed when it is flipped."""
        inputs = node.inputs if node.op_type in _BINARY or node.op_type == "Concat" else node.inputs[:1]
        return [v for v in inputs if v is not None and not is_constant(v)]

    def _flippable(self, node: ir.Node) -> bool:
        rank = len(self._perm)
        if node.domain not in ("", "ai.onnx") or node.graph is not self._top or not node.inputs:
            return False
        if any(len(self._shapes.shape(v) or ()) != rank for v in (*self._tensors(node), *node.outputs)):
            return False
        if node.op_type in _UNARY:
            return self._tensors(node) == [node.inputs[0]]
        if node.op_type in _BINARY:
            return (
                self._opset >= 7
                and bool(self._tensors(node))
                and all(self._permutable(v, node) for v in node.inputs if v is not None and is_constant(v))
            )
        if node.op_type == "Concat":
            return len(self._tensors(node)) == len(node.inputs)
        call = self._shapes.call(node)
        if node.op_type in _REDUCTIONS:
            axes = call.param("axes", 1)
            return (
                bool(attribute(node, "keepdims", 1)) and bool(axes) and (len(node.inputs) < 2 or self._weight(node, 1))
            )
        if node.op_type == "Slice":
            return (
                len(node.inputs) > 2
                and slice_bounds(call) is not None
                and all(self._weight(node, k) for k in range(1, len(node.inputs)) if node.inputs[k] is not None)
            )
        if node.op_type == "Pad":
            plain = len(node.inputs) < 4 or node.inputs[3] is None
            return self._opset >= 11 and plain and pad_amounts(call) is not None and self._weight(node, 1)
        return False

    def _weight(self, node: ir.Node, index: int) -> bool:
        return is_constant(node.inputs[index])

    def _permutable(self, value: ir.Value, node: ir.Node) -> bool:
        tensor = value.const_value
        assert tensor is not None
        if len(tensor.shape) > len(self._perm):
            return False
        return tensor.size <= 1 or tensor.nbytes <= _COPIED_BYTES or len(value.uses()) == 1

    def _flip(self, region: dict[ir.Node, None]) -> int:
        network, before = self._network(region)
        if network is None:
            return 0
        after, side = network.cut("flipped", "kept")
        if after >= before:
            return 0
        self._apply({node: None for node in region if node in side})
        return before - after

    def _network(self, region: dict[ir.Node, None]) -> tuple[Network | None, int]:
        """The cut problem of a region, and how many Transposes it has as it is."""
        network = Network()
        before = edges = 0
        values = dict.fromkeys(v for node in region for v in (*self._tensors(node), *node.outputs))
        for value in values:
            producer = value.producer()
            inside = [u.node for u in value.uses() if u.node in region and value in self._tensors(u.node)]
            inverse = [u.node for u in value.uses() if self._is_back(u.node)] if producer in region else []
            others = len(inside) + len(inverse) < len(value.uses()) or value.is_graph_output()
            edges += len(inside) + 2
            made, read = ("made", value), ("read", value)
            if producer is not None and producer not in region and self._is_forward(producer, region):
                before += 1
                network.add("flipped", made, 1)
            elif producer in region:
                network.add(producer, made, 1)
                network.add(read, producer, 1)
                if inverse:
                    before += 1
                    network.add("flipped", read, INFINITE)
            else:
                network.add(read, "kept", 1)
                for node in inside:
                    network.add(node, read, INFINITE)
                continue
            for node in inside:
                network.add(made, node, INFINITE)
                if producer in region:
                    network.add(node, read, INFINITE)
            if others:
                network.add(made, "kept", INFINITE)
        return (network if before > 1 and edges * before <= _MAX_WORK else None), before

    def _is_forward(self, node: ir.Node, region: dict[ir.Node, None]) -> bool:
        """A Transpose into the region, of something that stays as it is."""
        if node.graph is not self._top or _perm(node, self._shapes) != self._perm or node.inputs[0] is None:
            return False
        return node.inputs[0].producer() not in region

    def _is_back(self, node: ir.Node) -> bool:
        return node.graph is self._top and _perm(node, self._shapes) == self._inverse

    def _apply(self, flipped: dict[ir.Node, None]) -> None:
        order = [node for node in self._top if node in flipped]
        turned: dict[ir.Value, ir.Value] = {}
        border = self._border(order)
        for node in order:
            self._turn_attributes(node)
            tensors = set(self._tensors(node))
            for k, value in enumerate(list(node.inputs)):
                if value is None:
                    continue
                if value in tensors:
                    node.replace_input_with(k, self._turned(value, node, flipped, turned))
                elif node.op_type in _BINARY:
                    node.replace_input_with(k, self._turned_constant(value))
        for node in order:
            for value in node.outputs:
                self._settle(value, node, flipped)
        # A Transpose that is left without readers must not be found again: what it reads may have been turned.
        for node in border:
            if node.graph is not None and not any(v.uses() or v.is_graph_output() for v in node.outputs):
                self._top.remove(node, safe=True)

    def _border(self, nodes: list[ir.Node]) -> list[ir.Node]:
        """The Transposes next to ``nodes``."""
        around = [p for node in nodes for v in self._tensors(node) if (p := v.producer()) is not None]
        around += [use.node for node in nodes for v in node.outputs for use in v.uses()]
        return [node for node in dict.fromkeys(around) if is_op(node, "Transpose") and node.graph is self._top]

    def _turned(
        self, value: ir.Value, reader: ir.Node, flipped: dict[ir.Node, None], turned: dict[ir.Value, ir.Value]
    ) -> ir.Value:
        """``value`` in the order of storage that a flipped node reads."""
        producer = value.producer()
        if producer in flipped:
            return value
        if producer is not None and self._is_forward(producer, flipped) and producer.inputs[0] is not None:
            return producer.inputs[0]
        if value not in turned:
            node = add_node(self._top, "Transpose", [value], before=reader, attributes={"perm": list(self._inverse)})
            turned[value] = node.outputs[0]
            turned[value].type = value.type
            self._shapes.set(turned[value], Fact(self._before(value)))
        return turned[value]

    def _turned_constant(self, value: ir.Value) -> ir.Value:
        array = constant(value)
        assert array is not None
        if array.size <= 1:
            # One number broadcasts along any axis; only the rank may have mattered, and that is the other operand's.
            return value
        full = array.reshape((1,) * (len(self._perm) - array.ndim) + array.shape)
        return add_constant(self._top, f"{value.name}_turned", np.ascontiguousarray(full.transpose(self._inverse)))

    def _before(self, value: ir.Value) -> Shape:
        """Sizes of ``value`` before the Transpose."""
        shape = self._shapes.shape(value)
        assert shape is not None
        return tuple(shape[k] for k in self._inverse)

    def _turn_attributes(self, node: ir.Node) -> None:
        perm, rank = self._perm, len(self._perm)
        if node.op_type == "Concat":
            set_attribute(node, "axis", perm[axis_of(attribute(node, "axis", 1), rank)])
        elif node.op_type in _REDUCTIONS:
            axes = self._shapes.call(node).param("axes", 1)
            assert axes is not None
            new = [perm[axis_of(a, rank)] for a in axes]
            if len(node.inputs) > 1 and node.inputs[1] is not None:
                node.replace_input_with(1, add_constant(self._top, f"{node.name}_axes", np.array(new, np.int64)))
            else:
                set_attribute(node, "axes", new)
        elif node.op_type == "Slice":
            parts = slice_bounds(self._shapes.call(node))
            assert parts is not None
            node.resize_inputs(5)
            table = np.array([(s, e, perm[a], t) for a, (s, e, t) in parts.items()], np.int64).T
            for k, column in enumerate(table, 1):
                node.replace_input_with(k, add_constant(self._top, f"{node.name}_slice", column.copy()))
        elif node.op_type == "Pad":
            amounts = pad_amounts(self._shapes.call(node))
            assert amounts is not None
            pads = np.zeros((2, rank), np.int64)
            for axis, (low, high) in amounts.items():
                pads[:, perm[axis]] = int(low), int(high)  # type: ignore[arg-type]
            node.replace_input_with(1, add_constant(self._top, f"{node.name}_pads", pads.reshape(-1)))

    def _settle(self, value: ir.Value, node: ir.Node, flipped: dict[ir.Node, None]) -> None:
        """``value`` is stored in the other order now: give everybody else what they had."""
        shape = self._before(value)
        declared = value.shape
        back: list[ir.Node] = []
        rest: list[tuple[ir.Node, int]] = []
        for use in list(value.uses()):
            if use.node in flipped and value in self._tensors(use.node):
                continue
            if self._is_back(use.node):
                back.append(use.node)
            else:
                rest.append((use.node, use.idx))
        is_output = value.is_graph_output()
        self._shapes.set(value, Fact(shape))
        value.shape = None if declared is None else ir.Shape([declared[k] for k in self._inverse])
        if rest or is_output:
            self._turn_back(value, node, rest, is_output, declared)
        for transpose in back:
            replace(transpose.outputs[0], value)

    def _turn_back(
        self,
        value: ir.Value,
        node: ir.Node,
        users: list[tuple[ir.Node, int]],
        is_output: bool,
        declared: ir.Shape | None,
    ) -> None:
        """Give ``users``, and the graph output, the old order of storage of ``value``."""
        name = value.name
        new = add_node(self._top, "Transpose", [value], after=node, attributes={"perm": list(self._perm)}).outputs[0]
        new.type, new.shape = value.type, declared
        turned = self._shapes.shape(value)
        assert turned is not None
        self._shapes.set(new, Fact(tuple(turned[k] for k in self._perm)))
        for user, index in users:
            user.replace_input_with(index, new)
        if is_output:
            value.name, new.name = fresh_name(self._top, f"{name}_turned"), name
            for k, output in enumerate(self._top.outputs):
                if output is value:
                    self._top.outputs[k] = new
