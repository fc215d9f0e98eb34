"""Elementwise operators on the parts of a tensor: once on the whole, or on the one part that needs it."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

from onnxslim.graph import add_node, attribute, is_constant, is_op, only_user, replace
from onnxslim.shape_elementwise import BROADCAST
from onnxslim.shape_rules import Fact, axis_of
from onnxslim.shapes import Shapes
from onnxslim.sharing import attribute_key
from onnxslim.storage import UNARY

_BINARY = frozenset(BROADCAST.split())


def move_through_parts(model: ir.Model, shapes: Shapes) -> int:
    """Apply both rules to the main graph; returns the number of nodes saved.

    ``shapes`` has visited every node.
    """
    saved = 0
    for node in list(model.graph):
        if node.graph is model.graph and is_op(node, "Split"):
            saved += _before_split(node, shapes, model.graph)
        elif node.graph is model.graph and is_op(node, *_BINARY):
            saved += _into_concat(node, shapes, model.graph)
    return saved


def _before_split(split: ir.Node, shapes: Shapes, top: ir.Graph) -> int:
    """What all parts of a tensor go through is done before it is split: runtimes fuse it with the node in front."""
    readers = [only_user(value) for value in split.outputs]
    keys = {_elementwise(reader, value) for reader, value in zip(readers, split.outputs, strict=True)}
    first, whole = readers[0], split.inputs[0]
    if len(readers) < 2 or len(keys) > 1 or None in keys or first is None or whole is None:
        return 0
    inputs = [whole if value is split.outputs[0] else value for value in first.inputs]
    node = add_node(top, first.op_type, inputs, before=split)
    node.attributes.update(first.attributes)
    result = node.outputs[0]
    result.type, result.shape = first.outputs[0].type, whole.shape
    shapes.set(result, Fact(shapes.shape(whole)))
    split.replace_input_with(0, result)
    for reader, part in zip(readers, split.outputs, strict=True):
        assert reader is not None
        part.type = reader.outputs[0].type
        shapes.set(part, Fact(shapes.shape(part)))
        replace(reader.outputs[0], part)
        top.remove(reader, safe=True)
    return len(readers) - 1


def _elementwise(node: ir.Node | None, value: ir.Value) -> Hashable | None:
    """What ``node`` does to ``value`` element by element, the same for nodes that do the same; None for any other."""
    if node is None or not (is_op(node, *UNARY) or is_op(node, *_BINARY)) or node.graph is not value.graph:
        return None
    attributes = tuple((name, attribute_key(attr)) for name, attr in sorted(node.attributes.items()))
    numbers = [v for v in node.inputs if v is not value and v is not None]
    # A number with more axes would add them to the part.
    if not all(is_constant(v) and v.const_value is not None and v.const_value.shape.rank() == 0 for v in numbers):
        return None
    return (node.op_type, tuple(None if v is value else v for v in node.inputs), attributes)


def _into_concat(node: ir.Node, shapes: Shapes, top: ir.Graph) -> int:
    """Of two tensors joined in the same way, part by part: what is constant on both sides is computed once for all."""
    joins = [None if v is None else v.producer() for v in node.inputs]
    left, right = joins if len(joins) == 2 else (None, None)
    if left is None or right is None or left is right or len(left.inputs) != len(right.inputs):
        return 0
    if not all(is_op(n, "Concat") and only_user(n.outputs[0]) is node and n.graph is top for n in (left, right)):
        return 0
    pairs = list(zip(left.inputs, right.inputs, strict=True))
    sizes = [(shapes.shape(a), shapes.shape(b)) for a, b in pairs]
    if any(a is None or a != b for a, b in sizes):
        return 0  # also parts that only broadcasting makes alike
    rank = len(sizes[0][0] or ())
    axis, other = (axis_of(attribute(join, "axis", 1), rank) for join in (left, right))
    computed = [(a, b) for a, b in pairs if not (_own(a, left, right) and _own(b, left, right))]
    saved = 2 - len(computed)
    if axis != other or saved < 1:
        return 0
    parts: list[ir.Value | None] = []
    for a, b in pairs:
        part = add_node(top, node.op_type, [a, b], before=node, hint=node.outputs[0].name or "")
        part.attributes.update(node.attributes)
        shapes.visit(part)
        part.outputs[0].type = node.outputs[0].type
        parts.append(part.outputs[0])
    join = add_node(top, "Concat", parts, before=node, attributes={"axis": axis}, like=node.outputs[0])
    shapes.visit(join)
    replace(node.outputs[0], join.outputs[0])
    for dead in (node, left, right):
        top.remove(dead, safe=True)
    return saved


def _own(value: ir.Value | None, *readers: ir.Node) -> bool:
    """True for a weight that goes with ``readers``, so that another one of its size may take its place."""
    return (
        value is not None
        and is_constant(value)
        and not value.is_graph_output()
        and all(use.node in readers for use in value.uses())
    )
