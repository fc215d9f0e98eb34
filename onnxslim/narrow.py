"""Values that are broadcast before they need to be are computed on the shape that they have before that.

An Expand, an operator that meets nothing but neutral elements (``And`` with true), or a Gather with one index all over
gives equal elements along some axes. Where everything that reads the result is elementwise, and in the end meets other
operands that are as large, the narrow value does as well: masks, position numbers and embeddings of one token type.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxslim.graph import add_constant, add_node, attribute, is_constant, is_op, set_attribute
from onnxslim.noops import spread
from onnxslim.shape_elementwise import BROADCAST, broadcast_shapes
from onnxslim.shape_rules import Shape, axis_of
from onnxslim.shapes import Shapes
from onnxslim.storage import UNARY

_BROADCAST = frozenset({*BROADCAST.split(), "Where"})
# Readers of readers are followed up to this many nodes.
_MAX_READERS = 64


def narrow_values(model: ir.Model, shapes: Shapes) -> int:
    """Let readers take the narrow form of what was broadcast too early; returns the number of nodes saved.

    ``shapes`` has visited every node, and no node is dead.
    """
    if shapes.opset < 7:
        return 0
    positions = {node: k for k, node in enumerate(model.graph)}
    saved = 0
    for node in list(positions):
        if node.graph is None or not node.outputs[0].uses():
            continue
        source = spread(node, shapes)
        if source is not None:
            saved += _take(node.outputs[0], source, shapes, positions)
        elif is_op(node, "Gather"):
            saved += _gather_once(node, shapes, positions)
    return saved


def _take(value: ir.Value, source: ir.Value, shapes: Shapes, positions: dict[ir.Node, int]) -> bool:
    """Make the readers of ``value`` read ``source``, when their results are the same in the end."""
    shape, wide = shapes.shape(source), shapes.shape(value)
    if shape is None or wide is None or source is value or shape == wide:
        return False
    changed = _follow(value, shape, shapes, positions)
    if changed is None:
        return False
    value.replace_all_uses_with(source)
    for reader in sorted(changed, key=positions.__getitem__):
        reader.outputs[0].shape = None
        shapes.visit(reader)
    return True


def _follow(value: ir.Value, shape: Shape, shapes: Shapes, positions: dict[ir.Node, int]) -> list[ir.Node] | None:
    """The nodes whose results become narrow when ``value`` has ``shape``; None when somebody would notice."""
    narrow = {value: shape}
    waiting, changed = [value], dict[ir.Node, None]()
    while waiting:
        current = waiting.pop()
        if current.is_graph_output():
            return None
        for user in {use.node: None for use in current.uses()}:
            unary = user.op_type in UNARY and len(user.outputs) == 1 and user.inputs[0] is current
            if user.domain not in ("", "ai.onnx") or user not in positions or not (unary or user.op_type in _BROADCAST):
                return None
            before = shapes.shape(user.outputs[0])
            given = [
                narrow.get(v, shapes.shape(v)) for v in (user.inputs[:1] if unary else user.inputs) if v is not None
            ]
            after = broadcast_shapes(given)
            if before is None or after is None or len(changed) > _MAX_READERS:
                return None
            known = narrow.get(user.outputs[0])
            if after == (before if known is None else known):
                continue
            narrow[user.outputs[0]] = after
            changed[user] = None
            waiting.append(user.outputs[0])
    return list(changed)


def _gather_once(node: ir.Node, shapes: Shapes, positions: dict[ir.Node, int]) -> bool:
    """A Gather with the same index all over: gather it once, into axes of size 1."""
    data, indices = node.inputs
    grid, shape, own = shapes.grid(indices), shapes.shape(indices), shapes.shape(data)
    if grid is None or shape is None or own is None or not grid.uniform or not isinstance(grid.start, int):
        return False
    size = own[axis_of(attribute(node, "axis", 0), len(own))]
    inside = isinstance(size, int) and -size <= grid.start < size
    if not inside or (is_constant(indices) and math.prod(d if isinstance(d, int) else 2 for d in shape) == 1):
        return False
    top = node.graph
    if not isinstance(top, ir.Graph) or indices is None or indices.dtype is None:
        return False
    index = np.full((1,) * len(shape), grid.start, indices.dtype.numpy())
    once = add_node(top, "Gather", [data, add_constant(top, f"{node.outputs[0].name}_index", index)], before=node)
    set_attribute(once, "axis", attribute(node, "axis", 0))
    once.outputs[0].type = node.outputs[0].type
    shapes.visit(once)
    if _take(node.outputs[0], once.outputs[0], shapes, positions):
        return True
    top.remove(once, safe=True)
    return False
