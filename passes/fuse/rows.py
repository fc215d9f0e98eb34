"""Matrix products of a batch of one, with their biases, as Gemm of matrices.

A file exported for one sample computes on (1, positions, channels). Without the axis of size 1 a product and its bias
are one Gemm, while everything else on the way (sums, normalizations, activations, cuts along other axes) computes the
same numbers. ONNX Runtime makes Gemm of such a pair by itself, with a Reshape before and one behind. Where the axis
goes and comes back is a minimum cut: a tensor that needs it on one side only costs one node, unless a Reshape stands
there anyway, and each pair that becomes one node pays for one.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import along
from onnxslim.mincut import INFINITE, Network
from onnxslim.passes.fuse.work import Work
from onnxslim.storage import UNARY

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
SUMS = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Mean")
# Operators along an axis, with its default.
ALONG = {"LayerNormalization": -1, "RMSNormalization": -1, "Softmax": -1, "LogSoftmax": -1, "Split": 0, "Concat": 0}
# Before this version Slice has other arguments, and Softmax means all axes from its own on.
OLDEST = 13
# Regions of more nodes are left as they are.
LARGEST = 20_000
# Constants that other nodes read too are stored a second time up to this size.
COPIED_BYTES = 4096


def drop_batch_axis(work: Work) -> None:
    """Let nodes of the main graph compute on matrices where that turns products and their biases into Gemm."""
    if g.opset(work.model) < OLDEST:
        return
    region = {node: None for node in work.model.graph if _takes_matrices(node)}
    biases = {node: bias for node in region if (bias := _bias(node, region)) is not None}
    if not biases or len(region) > LARGEST:
        return
    network = _network(region, biases)
    # Nodes are on that side only where they save more than they cost.
    _, side = network.cut("matrices", "kept")
    turned = {node: None for node in region if node in side}
    if turned:
        _Rewriting(work, turned, biases).run()
        work.done["Gemm"] += sum(node in turned for node in biases)


@dataclasses.dataclass(frozen=True, eq=False)
class Bias:
    """The Add behind a product, and the constant that it adds, one number per column."""

    add: ir.Node
    constant: np.ndarray


def _network(region: dict[ir.Node, None], biases: dict[ir.Node, Bias]) -> Network:
    network = Network()
    for node, bias in biases.items():
        network.add("matrices", node, 1)
        network.add(node, bias.add, INFINITE)
        network.add(bias.add, node, INFINITE)
    for value in dict.fromkeys(v for node in region for v in (*_moving(node), *node.outputs)):
        producer = value.producer()
        inside = [use.node for use in value.uses() if use.node in region and value in _moving(use.node)]
        with_axis, without = ("with", value), ("without", value)
        for node in inside:
            network.add(node, without, INFINITE)
        if producer is None or producer not in region:
            network.add(without, "kept", 1)
            continue
        network.add(without, producer, 1)
        network.add(producer, with_axis, 1)
        for node in inside:
            network.add(with_axis, node, INFINITE)
        if value.is_graph_output() or any(use.node not in inside and not _is_view(use.node) for use in value.uses()):
            network.add(with_axis, "kept", INFINITE)
    return network


def _has_axis(value: ir.Value | None) -> bool:
    """True for a tensor (1, rows, columns) of float32."""
    shape = g.known_shape(value)
    return (
        value is not None
        and shape is not None
        and len(shape) == 3
        and shape[0] == 1
        and value.dtype is ir.DataType.FLOAT
    )


def _is_view(node: ir.Node) -> bool:
    """True for a node that gives its data a shape of which one size at most is unknown."""
    shape = g.known_shape(node.outputs[0]) if g.is_op(node, *VIEWS) else None
    return shape is not None and sum(d is None for d in shape) <= 1 and 0 not in shape


def _moving(node: ir.Node) -> list[ir.Value]:
    """The operands that lose their first axis with the result."""
    if g.is_op(node, *VIEWS):
        return []  # whatever their shape
    operands = node.inputs if g.is_op(node, *SUMS, "Concat") else node.inputs[:1]
    return [v for v in operands if v is not None and not g.is_constant(v) and _has_axis(v)]


def _takes_matrices(node: ir.Node) -> bool:
    """True when ``node`` computes the same rows and columns of its results without the first axis."""
    if not node.outputs or not all(_has_axis(v) for v in node.outputs):
        return False
    if _is_view(node):
        return True
    if not _moving(node):
        return False
    others = [v for v in node.inputs[1:] if v is not None]
    if g.is_op(node, *UNARY):
        return True
    if g.is_op(node, *SUMS):
        return all(
            _has_axis(v) or len(g.known_shape(v) or (0,) * 3) < 3 for v in node.inputs if not g.is_constant(v)
        ) and (all(_movable(v) for v in node.inputs if g.is_constant(v)))
    if g.is_op(node, "MatMul"):
        return len(g.known_shape(others[0]) or ()) == 2
    if g.is_op(node, *ALONG):
        if g.attribute(node, "axis", ALONG[node.op_type]) % 3 == 0:
            return False
        return not g.is_op(node, "Concat") or all(
            _has_axis(v) and (not g.is_constant(v) or _movable(v)) for v in node.inputs
        )
    if g.is_op(node, "Transpose"):
        return g.attribute(node, "perm", [2, 1, 0])[0] == 0
    if g.is_op(node, "Slice"):
        axes = g.constant(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and bool(np.all(axes % 3 != 0))
    return False


def _movable(value: ir.Value | None) -> bool:
    """True for a constant operand that has no axis to lose, or one that may be stored without it."""
    tensor = value.const_value if value is not None else None
    if value is None or tensor is None:
        return False
    return len(tensor.shape) < 3 or len(value.uses()) == 1 or tensor.nbytes <= COPIED_BYTES


def _bias(node: ir.Node, region: dict[ir.Node, None]) -> Bias | None:
    add = g.only_user(node.outputs[0]) if g.is_op(node, "MatMul") else None
    if add is None or add not in region or not g.is_op(add, "Add"):
        return None
    other = next(v for v in add.inputs if v is not node.outputs[0])
    array, shape = g.constant(other), g.known_shape(node.inputs[1])
    if array is None or shape is None or shape[1] is None or array.size != shape[1]:
        return None
    bias = along(array, -1, shape[1], 3)
    return Bias(add, bias) if bias is not None else None


class _Rewriting:
    """Nodes of ``turned`` take and give matrices; everybody else keeps what they had."""

    def __init__(self, work: Work, turned: dict[ir.Node, None], biases: dict[ir.Node, Bias]) -> None:
        self._work = work
        self._top = work.model.graph
        self._turned = turned
        self._biases = biases
        self._matrices: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        for node in self._turned:
            self._operands(node)
            self._parameters(node)
        views = {
            use.node: None for node in self._turned for v in node.outputs for use in v.uses() if _is_view(use.node)
        }
        for node in self._turned:
            for value in node.outputs:
                self._result(node, value)
        for node in {**{n: None for n in self._turned if _is_view(n)}, **views}:
            self._view(node)
        for node, bias in self._biases.items():
            if node in self._turned:
                self._gemm(node, bias)

    def _first(self) -> ir.Value:
        return self._work.constant(np.array([0], np.int64))

    def _operands(self, node: ir.Node) -> None:
        moving = _moving(node)
        for index, value in enumerate(list(node.inputs)):
            if value is None or value not in moving or value.producer() in self._turned:
                continue
            if value not in self._matrices:
                matrix = g.add_node(self._top, "Squeeze", [value, self._first()], before=node).outputs[0]
                matrix.type, matrix.shape = value.type, _without_axis(value)
                self._matrices[value] = matrix
            node.replace_input_with(index, self._matrices[value])

    def _parameters(self, node: ir.Node) -> None:
        """Axes and constants of ``node`` without the first axis."""
        if g.is_op(node, *ALONG):
            axis = g.attribute(node, "axis", ALONG[node.op_type])
            g.set_attribute(node, "axis", axis if axis < 0 else axis - 3)
        elif g.is_op(node, "Transpose"):
            g.set_attribute(node, "perm", [p - 1 for p in g.attribute(node, "perm")[1:]])
        elif g.is_op(node, "Slice"):
            axes = g.constant(node.inputs[3])
            assert axes is not None
            if np.any(axes > 0):
                node.replace_input_with(3, self._work.constant(np.where(axes > 0, axes - 3, axes)))
        if g.is_op(node, *SUMS, "Concat"):
            for index, value in enumerate(list(node.inputs)):
                array = g.constant(value) if g.is_constant(value) else None
                if array is not None and array.ndim == 3:
                    node.replace_input_with(index, self._work.constant(array[0]))

    def _result(self, node: ir.Node, value: ir.Value) -> None:
        """``value`` is a matrix from now on; those who cannot take one get it with its axis."""
        declared = value.shape
        value.shape = _without_axis(value)
        kept = [
            use
            for use in value.uses()
            if not _is_view(use.node) and not (use.node in self._turned and not g.is_op(use.node, *VIEWS))
        ]
        if not kept and not value.is_graph_output():
            return
        result = g.add_node(self._top, "Unsqueeze", [value, self._first()], after=node).outputs[0]
        result.type, result.shape = value.type, declared
        for use in kept:
            use.node.replace_input_with(use.idx, result)
        if value.is_graph_output():
            value.name, result.name = g.fresh_name(self._top, f"{value.name}_matrix"), value.name
            for index, output in enumerate(self._top.outputs):
                if output is value:
                    self._top.outputs[index] = result

    def _view(self, node: ir.Node) -> None:
        """Say the shape of the result in numbers: what it reads, or what it gives, has lost its first axis."""
        shape = g.known_shape(node.outputs[0])
        assert shape is not None and node.inputs[0] is not None
        target = np.array([-1 if d is None else d for d in shape], np.int64)
        node.op_type = "Reshape"
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(1, self._work.constant(target))

    def _gemm(self, node: ir.Node, bias: Bias) -> None:
        node.op_type = "Gemm"
        node.resize_inputs(3)
        node.replace_input_with(2, self._work.constant(bias.constant.astype(np.float32)))
        self._work.replace(bias.add, node)


def _without_axis(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape(list(value.shape)[1:])
