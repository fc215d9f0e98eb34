"""Two nodes in a row that one node does as well, with the same result bit for bit.

Each rule looks at a node and at the one before it, where nobody else reads the value between the two. The node is
rewritten in place and keeps its output; the one before is left without users.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxslim.graph import add_constant, attribute, constant, is_constant, is_op, only_user, set_attribute
from onnxslim.shape_moves import slice_bounds
from onnxslim.shape_rules import axis_of
from onnxslim.shapes import Shapes

Rule: TypeAlias = Callable[[ir.Node, ir.Node, Shapes, ir.Graph], bool]


def merge_pair(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Merge ``node`` with the one before it, if a rule knows how."""
    rules = PAIRS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if rules is None:
        return False
    for value in node.inputs if node.op_type == "Concat" else node.inputs[:1]:
        before = None if value is None else value.producer()
        if value is None or before is None or before.domain not in ("", "ai.onnx"):
            continue
        alone = only_user(value) is node and before.graph is node.graph
        if alone and any(rule(node, before, shapes, top) for rule in rules):
            return True
    return False


def _transposes(node: ir.Node, before: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Transpose of Transpose: the permutations are composed."""
    if not is_op(before, "Transpose") or before.inputs[0] is None:
        return False
    first, second = attribute(before, "perm"), attribute(node, "perm")
    shape = shapes.shape(before.inputs[0])
    if first is None or second is None:
        if shape is None:
            return False
        backwards = list(range(len(shape)))[::-1]
        first, second = first or backwards, second or backwards
    node.replace_input_with(0, before.inputs[0])
    set_attribute(node, "perm", [first[p] for p in second])
    return True


def _slices(node: ir.Node, before: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Slice of Slice along other axes: one Slice."""
    if not is_op(before, "Slice") or len(node.inputs) < 3 or len(before.inputs) < 3:
        return False
    one, two = slice_bounds(shapes.call(before)), slice_bounds(shapes.call(node))
    if one is None or two is None or set(one) & set(two):
        return False
    if not all(is_constant(v) for n in (before, node) for v in n.inputs[1:] if v is not None):
        return False
    parts = {**one, **two}
    table = np.array([(start, end, axis, step) for axis, (start, end, step) in sorted(parts.items())], np.int64).T
    node.resize_inputs(5)
    node.replace_input_with(0, before.inputs[0])
    for k, column in enumerate(table, 1):
        node.replace_input_with(k, add_constant(top, f"{node.outputs[0].name}_slice", column.copy()))
    return True


def _concats(node: ir.Node, before: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Concat of a Concat along the same axis: one Concat of all."""
    shape = shapes.shape(node.outputs[0])
    if shape is None or not is_op(before, "Concat"):
        return False
    axes = [axis_of(attribute(n, "axis", 1), len(shape)) for n in (before, node)]
    if axes[0] != axes[1]:
        return False
    place = list(node.inputs).index(before.outputs[0])
    inputs = [*node.inputs[:place], *before.inputs, *node.inputs[place + 1 :]]
    node.resize_inputs(len(inputs))
    for k, value in enumerate(inputs):
        node.replace_input_with(k, value)
    return True


def _squeezed_slice(node: ir.Node, before: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Slice of one element of an axis and Squeeze of that axis: Gather of a scalar index."""
    source = before.inputs[0] if is_op(before, "Slice") else None
    shape, result = shapes.shape(source), shapes.shape(node.outputs[0])
    parts = slice_bounds(shapes.call(before)) if shape is not None else None
    if source is None or shape is None or parts is None or len(parts) != 1:
        return False
    axis, (start, _, step) = next(iter(parts.items()))
    if not isinstance(start, int) or step != 1 or (shapes.shape(before.outputs[0]) or {axis: 0})[axis] != 1:
        return False
    # A start beyond the end would have been moved to it; Gather would fail.
    size = shape[axis]
    inside = -size <= start < size if isinstance(size, int) else start in (0, -1)
    if not inside or result != (*shape[:axis], *shape[axis + 1 :]):
        return False
    if start < 0 and shapes.opset < 11:  # Gather counts from the front only
        if not isinstance(size, int):
            return False
        start += size
    _to_gather(node, source, axis, np.array(start, np.int64), top)
    return True


def _unsqueezed_gather(node: ir.Node, before: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Gather of a scalar index and Unsqueeze of that axis: Gather of an index vector of one element."""
    if not is_op(before, "Gather"):
        return False
    source, index = before.inputs[0], constant(before.inputs[1])
    shape, result = shapes.shape(source), shapes.shape(node.outputs[0])
    if index is None or index.ndim or source is None or shape is None:
        return False
    axis = axis_of(attribute(before, "axis", 0), len(shape))
    if result != (*shape[:axis], 1, *shape[axis + 1 :]):
        return False
    _to_gather(node, source, axis, index.reshape(1), top)
    return True


def _to_gather(node: ir.Node, source: ir.Value, axis: int, index: np.ndarray, top: ir.Graph) -> None:
    node.op_type = "Gather"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, source)
    node.replace_input_with(1, add_constant(top, f"{node.outputs[0].name}_index", index))
    set_attribute(node, "axis", axis)


_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare", "ArgMax", "ArgMin"),
)


def _reduction(node: ir.Node, before: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """A reduction whose axes are then taken away, or put back: ``keepdims`` does that."""
    shape = shapes.shape(before.inputs[0]) if is_op(before, *_REDUCTIONS) else None
    result, middle = shapes.shape(node.outputs[0]), shapes.shape(before.outputs[0])
    if shape is None or middle is None or result is None or len(middle) == len(result):
        return False
    keep = len(middle) == len(shape)
    call = shapes.call(before)
    if call.node.op_type.startswith("Arg"):
        axes = [axis_of(call.attr("axis", 0), len(shape))]
    else:
        given = call.param("axes", 1)
        if given is None and call.has(1):
            return False
        axes = [axis_of(a, len(shape)) for a in given or range(len(shape))]
        if not given and call.attr("noop_with_empty_axes", 0):
            return False
    other = (
        tuple(d for k, d in enumerate(shape) if k not in axes)
        if keep
        else tuple(1 if k in axes else d for k, d in enumerate(shape))
    )
    if other != result:
        return False
    node.op_type = before.op_type
    node.attributes.clear()
    for attr in before.attributes.values():
        node.attributes[attr.name] = attr
    node.resize_inputs(len(before.inputs))
    for k, value in enumerate(before.inputs):
        node.replace_input_with(k, value)
    set_attribute(node, "keepdims", int(not keep))
    return True


def _negated_where(node: ir.Node, before: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Where(Not(c), a, b) is Where(c, b, a)."""
    if not is_op(before, "Not"):
        return False
    _, yes, no = node.inputs
    for k, value in enumerate((before.inputs[0], no, yes)):
        node.replace_input_with(k, value)
    return True


PAIRS: dict[str, tuple[Rule, ...]] = {
    "Concat": (_concats,),
    "Flatten": (_reduction,),
    "Reshape": (_reduction, _squeezed_slice, _unsqueezed_gather),
    "Slice": (_slices,),
    "Squeeze": (_reduction, _squeezed_slice),
    "Transpose": (_transposes,),
    "Unsqueeze": (_reduction, _unsqueezed_gather),
    "Where": (_negated_where,),
}
