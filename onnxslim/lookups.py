"""Gathers whose indices are a grid: what they pick is a slice of the data, or all of it.

Masks are looked up with index tensors that count through them (``mask[batch_index, key_index]``). Where the indices of
an axis run from 0 by 1 along one axis of the result, and along no other, they pick a leading part of that axis; with
indices that count through a whole axis row by row, the result is a view. Both replace the indices and what computed
them. Indices beyond the data, with which Gather fails, are not reported by a Slice.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxslim.graph import add_constant, add_node, attribute, is_constant, is_op, only_user, set_attribute
from onnxslim.shape_rules import Fact, Grid, Shape, axis_of
from onnxslim.shapes import Shapes
from onnxslim.symbolic import Dim
from onnxslim.views import constant_target, is_view, make_reshape


def replace_lookup(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Replace a Gather or GatherND by the view or Slice that it amounts to."""
    if is_op(node, "Gather"):
        return _whole_axis(node, shapes, top)
    if is_op(node, "GatherND") and not attribute(node, "batch_dims", 0):
        return _leading_part(node, shapes, top)
    return False


def _whole_axis(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Gather with indices that count through the whole axis: a view."""
    data, indices = node.inputs
    old, new = shapes.shape(data), shapes.shape(node.outputs[0])
    grid, shape = shapes.grid(indices), shapes.shape(indices)
    if data is None or old is None or new is None or grid is None or shape is None or is_constant(indices):
        return False
    count: Dim = 1
    for size, step in zip(reversed(shape), reversed(grid.steps), strict=True):
        if size == 1:
            continue
        if step != count:
            return False
        count = count * size
    if grid.start != 0 or count != old[axis_of(attribute(node, "axis", 0), len(old))]:
        return False
    # Data that was flattened to be counted through has lost the sizes that a target could copy.
    source: ir.Value | None = data
    target = constant_target(old, new)
    while target is None and source is not None and is_view(before := source.producer(), shapes):
        assert before is not None
        source = before.inputs[0]
        target = constant_target(shapes.shape(source), new)
    if target is None or source is None:
        return False
    make_reshape(node, source, target, top)
    return True


def _leading_part(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """GatherND with one index tensor per axis, each counting along an axis of the result: a Slice and a view."""
    data, indices = node.inputs
    old, new = shapes.shape(data), shapes.shape(node.outputs[0])
    joined = None if indices is None else indices.producer()
    if data is None or old is None or new is None or joined is None or not is_op(joined, "Concat"):
        return False
    if indices is None or only_user(indices) is not node:
        return False
    axes = _counted(joined, shapes)
    if axes is None:
        return False
    shape, counted = axes
    sizes = [shape[k] for k in counted]
    cut = [j for j, size in enumerate(sizes) if size != old[j]]
    middle = (*sizes, *old[len(sizes) :])
    target = constant_target(middle, new)
    if target is None:
        return False
    ends = [_vector(sizes[j], node, shapes, top) for j in cut]
    if any(end is None for end in ends):
        return False
    value = data
    if cut:
        last = (
            ends[0] if len(cut) == 1 else add_node(top, "Concat", ends, before=node, attributes={"axis": 0}).outputs[0]
        )
        assert last is not None
        last.type = ir.TensorType(ir.DataType.INT64)
        starts, where = (
            add_constant(top, f"{node.outputs[0].name}_slice", np.array(v, np.int64)) for v in ([0] * len(cut), cut)
        )
        part = add_node(top, "Slice", [data, starts, last, where], before=node, hint=str(node.outputs[0].name))
        value = part.outputs[0]
        value.type = data.type
        shapes.set(value, Fact(middle))
    make_reshape(node, value, target, top)
    return True


def _counted(joined: ir.Node, shapes: Shapes) -> tuple[Shape, list[int]] | None:
    """The shape of the index tensors, and for each of them the axis along which it counts from 0 by 1."""
    shape: Shape | None = None
    counted: list[int] = []
    for value in joined.inputs:
        grid, own = shapes.grid(value), shapes.shape(value)
        if grid is None or own is None or own[-1] != 1 or (shape is not None and own != shape):
            return None
        shape = own
        axis = _only_step(grid, own)
        if axis is None or (counted and axis <= counted[-1]):
            return None
        counted.append(axis)
    if shape is None or axis_of(attribute(joined, "axis", 1), len(shape)) != len(shape) - 1:
        return None
    rest = [d for k, d in enumerate(shape) if k not in counted]
    return (shape, counted) if all(d == 1 for d in rest) else None


def _only_step(grid: Grid, shape: Shape) -> int | None:
    steps = [k for k, step in enumerate(grid.steps) if step != 0]
    return steps[0] if grid.start == 0 and len(steps) == 1 and grid.steps[steps[0]] == 1 else None


def _vector(size: Dim, before: ir.Node, shapes: Shapes, top: ir.Graph) -> ir.Value | None:
    """A tensor of one element that holds a size which is a number or that of a graph input."""
    if isinstance(size, int):
        return add_constant(top, f"{before.outputs[0].name}_end", np.array([size], np.int64))
    for value in top.inputs:
        for axis, dim in enumerate(shapes.shape(value) or ()):
            if dim == size:
                return _size_of(value, axis, before, shapes, top)
    return None


def _size_of(value: ir.Value, axis: int, before: ir.Node, shapes: Shapes, top: ir.Graph) -> ir.Value:
    node = add_node(top, "Shape", [value], before=before)
    node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    if shapes.opset >= 15:
        set_attribute(node, "start", axis)
        set_attribute(node, "end", axis + 1)
    else:
        shapes.visit(node)
        index = add_constant(top, f"{value.name}_axis", np.array([axis], np.int64))
        node = add_node(top, "Gather", [node.outputs[0], index], before=before, attributes={"axis": 0})
        node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
    shapes.visit(node)
    return node.outputs[0]
