"""Slices that cut one tensor into consecutive parts become one Split."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxslim.graph import add_constant, fresh_name, is_op, opset, replace, set_attribute
from onnxslim.shape_moves import slice_bounds
from onnxslim.shapes import Shapes

Cut = tuple[int, int, ir.Node]


def split_slices(model: ir.Model, shapes: Shapes) -> int:
    """Replace groups of slices that cover an axis from end to end; returns the number of nodes saved."""
    saved = 0
    order = {node: k for k, node in enumerate(model.graph)}
    values = [*model.graph.inputs, *(v for node in order for v in node.outputs)]
    for value in values:
        users = {use.node for use in value.uses() if is_op(use.node, "Slice") and use.idx == 0}
        if len(users) < 2:
            continue
        for axis, cuts in _by_axis(users, shapes, model.graph).items():
            shape = shapes.shape(value)
            if shape is None or len(cuts) < 2:
                continue
            cuts.sort(key=lambda cut: cut[:2])
            ends = [0, *(end for _, end, _ in cuts)]
            if all(start == end for (start, _, _), end in zip(cuts, ends, strict=False)) and ends[-1] == shape[axis]:
                first = min((node for *_, node in cuts), key=order.__getitem__)
                _replace(model, value, axis, cuts, shapes, first)
                saved += len(cuts) - 1
    return saved


def _by_axis(users: set[ir.Node], shapes: Shapes, graph: ir.Graph) -> dict[int, list[Cut]]:
    """Slices along a single axis of known size, as (start, end, node)."""
    found: dict[int, list[Cut]] = {}
    for node in users:
        parts = slice_bounds(shapes.call(node)) if node.graph is graph else None
        if parts is None or len(parts) != 1:
            continue
        axis, (start, end, step) = next(iter(parts.items()))
        size = (shapes.shape(node.inputs[0]) or {axis: None})[axis]
        if isinstance(size, int) and isinstance(start, int) and isinstance(end, int) and step == 1:
            first, last, _ = slice(start, end).indices(size)
            if first < last:
                found.setdefault(axis, []).append((first, last, node))
    return found


def _replace(model: ir.Model, value: ir.Value, axis: int, cuts: list[Cut], shapes: Shapes, before: ir.Node) -> None:
    top = model.graph
    outputs = [
        ir.Value(name=fresh_name(top, f"{old.name}_part"), type=old.type, shape=old.shape)
        for old in (node.outputs[0] for *_, node in cuts)
    ]
    split = ir.node("Split", [value], outputs=outputs, name=fresh_name(top, f"{value.name}_Split"))
    set_attribute(split, "axis", axis)
    sizes = [end - start for start, end, _ in cuts]
    if opset(model) >= 13:
        split.resize_inputs(2)
        split.replace_input_with(1, add_constant(top, f"{value.name}_sizes", np.array(sizes, np.int64)))
    else:
        set_attribute(split, "split", sizes)
    top.insert_before(before, split)
    for (*_, node), output in zip(cuts, outputs, strict=True):
        shapes.same(node.outputs[0], output)
        replace(node.outputs[0], output)
        top.remove(node, safe=True)
