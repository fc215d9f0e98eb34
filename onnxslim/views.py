"""Operators that only give a tensor another shape: constant targets, and chains that become one Reshape.

Reshape, Flatten, Squeeze, Unsqueeze, and a Transpose that moves axes of size 1 only, keep the elements in order, so any
chain of them is one Reshape. Its target is a constant when at most one size is neither a number (written as it is) nor
the size of the input at the same place (written 0): that one is written -1. Such a target holds for every size of the
inputs but one: a copied size of 0 beside a -1 is an error in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import symbolic
from onnxslim.graph import add_constant, add_node, attribute, is_constant, is_op, set_attribute
from onnxslim.shape_moves import slice_bounds
from onnxslim.shape_rules import Shape
from onnxslim.shapes import Shapes

_END = 2**63 - 1


def constant_target(source: Shape | None, shape: Shape | None) -> list[int] | None:
    """A target for Reshape from ``source`` to ``shape`` made of numbers, or None when there is none."""
    if shape is None:
        return None
    target: list[int] = []
    for k, dim in enumerate(shape):
        if isinstance(dim, int):
            if dim == 0:
                return None  # 0 would copy
            target.append(dim)
        elif source is not None and k < len(source) and source[k] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def is_view(node: ir.Node | None, shapes: Shapes) -> bool:
    """True when the first output has the elements of the first input in the same order."""
    if is_op(node, "Flatten", "Reshape", "Squeeze", "Unsqueeze"):
        return True
    if node is None or not is_op(node, "Transpose"):
        return False
    shape = shapes.shape(node.inputs[0])
    if shape is None:
        return False
    perm = attribute(node, "perm", list(range(len(shape)))[::-1])
    order = [p for p in perm if shape[p] != 1]
    return order == sorted(order)


def merge_views(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Make ``node`` one view of what the view before it reads, when nothing but views reads that view."""
    before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if before is None or not is_view(node, shapes) or not is_view(before, shapes):
        return False
    middle = before.outputs[0]
    if middle.is_graph_output() or not all(use.idx == 0 and is_view(use.node, shapes) for use in middle.uses()):
        return False
    source = before.inputs[0]
    old, new = shapes.shape(source), shapes.shape(node.outputs[0])
    if source is None or old is None or new is None:
        return False
    # Squeeze and Unsqueeze are exact for every size, and what runtimes look for.
    squeezed = _squeezing(old, new) if all(is_op(n, "Squeeze", "Unsqueeze") for n in (node, before)) else None
    if squeezed is not None:
        node.op_type = squeezed[0]
        node.replace_input_with(0, source)
        _set_axes(node, squeezed[1], shapes.opset, top)
        return True
    target = constant_target(old, new)
    if target is None:
        return False
    make_reshape(node, source, target, top)
    return True


def _ones_between(short: Shape, long: Shape) -> list[int] | None:
    """Axes of ``long`` that must be 1 and go to leave ``short``."""
    axes = []
    k = 0
    for axis, dim in enumerate(long):
        if k < len(short) and short[k] == dim:
            k += 1
        elif dim == 1:
            axes.append(axis)
        else:
            return None
    return axes if k == len(short) and axes else None


def _squeezing(old: Shape, new: Shape) -> tuple[str, list[int]] | None:
    """The Squeeze or Unsqueeze, with its axes, that leads from one shape to another."""
    axes = _ones_between(old, new)
    if axes is not None:
        return "Unsqueeze", axes
    axes = _ones_between(new, old)
    return None if axes is None else ("Squeeze", axes)


def _set_axes(node: ir.Node, axes: list[int], version: int, top: ir.Graph) -> None:
    node.attributes.clear()
    if version < 13:
        node.resize_inputs(1)
        set_attribute(node, "axes", axes)
    else:
        node.resize_inputs(2)
        node.replace_input_with(1, add_constant(top, f"{node.outputs[0].name}_axes", np.array(axes, np.int64)))


def can_view(old: Shape, new: Shape) -> bool:
    """True when `add_view` knows a node that leads from one shape to the other."""
    return _squeezing(old, new) is not None or constant_target(old, new) is not None


def add_view(value: ir.Value, old: Shape, new: Shape, version: int, top: ir.Graph, **place: ir.Node) -> ir.Value:
    """A new node, before or after another, that gives ``value`` the shape ``new``."""
    squeezed = _squeezing(old, new)
    if squeezed is not None:
        node = add_node(top, squeezed[0], [value], **place)  # type: ignore[arg-type]
        _set_axes(node, squeezed[1], version, top)
        return node.outputs[0]
    target = add_constant(top, f"{value.name}_shape", np.array(constant_target(old, new), np.int64))
    return add_node(top, "Reshape", [value, target], **place).outputs[0]  # type: ignore[arg-type]


def make_reshape(node: ir.Node, source: ir.Value, target: Sequence[int], top: ir.Graph) -> None:
    """Turn ``node`` in place into a Reshape of ``source``."""
    node.op_type = "Reshape"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, source)
    node.replace_input_with(1, add_constant(top, f"{node.outputs[0].name}_shape", np.array(target, np.int64)))


def settle_target(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Replace a computed shape, range or size that ``node`` reads by a constant that means the same."""
    if is_op(node, "Reshape"):
        return _settle_reshape(node, shapes, top)
    if is_op(node, "Expand"):
        return _settle_expand(node, shapes, top)
    if is_op(node, "Slice"):
        return _settle_slice(node, shapes, top)
    if is_op(node, "Resize"):
        return _settle_resize(node, shapes, top)
    return False


def _computed(node: ir.Node, index: int) -> bool:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value is not None and not is_constant(value)


def _settle_reshape(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    if not _computed(node, 1):
        return False
    source = node.inputs[0]
    target = constant_target(shapes.shape(source), shapes.shape(node.outputs[0]))
    if source is None or target is None:
        return False
    make_reshape(node, source, target, top)
    return True


def _settle_expand(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    source, result = shapes.shape(node.inputs[0]), shapes.shape(node.outputs[0])
    if not _computed(node, 1) or source is None or result is None:
        return False
    padded = (*[1] * (len(result) - len(source)), *source)
    # Where the size does not change, 1 says so; elsewhere it must be a number.
    target = [1 if old == new else new for old, new in zip(padded, result, strict=True)]
    if not all(isinstance(d, int) for d in target):
        return False
    node.replace_input_with(1, add_constant(top, f"{node.outputs[0].name}_shape", np.array(target, np.int64)))
    return True


def _settle_slice(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    if len(node.inputs) < 3 or not _computed(node, 2):
        return False
    call = shapes.call(node)
    shape, parts, ends = call.shape(), slice_bounds(call), node.inputs[2]
    if shape is None or parts is None or ends is None or ends.dtype is None:
        return False
    far = min(_END, int(np.iinfo(ends.dtype.numpy()).max))
    values: list[int] = []
    for axis, (_, end, step) in parts.items():
        if isinstance(end, int):
            values.append(end)
        elif step > 0 and symbolic.nonnegative(end - shape[axis]):
            values.append(far)
        else:
            return False
    array = np.array(values, ends.dtype.numpy())
    node.replace_input_with(2, add_constant(top, f"{node.outputs[0].name}_ends", array))
    return True


def _settle_resize(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Sizes that are whole multiples of the input's become scales, which ONNX Runtime derives from them anyway."""
    if len(node.inputs) < 4 or not _computed(node, 3):
        return False
    old, new = shapes.shape(node.inputs[0]), shapes.shape(node.outputs[0])
    plain = attribute(node, "keep_aspect_ratio_policy", "stretch") == "stretch" and "axes" not in node.attributes
    if old is None or new is None or not plain:
        return False
    ratios = [symbolic.quotient([b], [a]) for a, b in zip(old, new, strict=True)]
    if not all(isinstance(r, int) for r in ratios):
        return False
    node.resize_inputs(3)
    node.replace_input_with(2, add_constant(top, f"{node.outputs[0].name}_scales", np.array(ratios, np.float32)))
    return True


# Every value of the key is a value of each of these types.
_HOLDS = {
    ir.DataType.BOOL: "INT8 UINT8 INT16 UINT16 INT32 UINT32 INT64 UINT64 FLOAT16 BFLOAT16 FLOAT DOUBLE",
    ir.DataType.INT8: "INT16 INT32 INT64 FLOAT16 FLOAT DOUBLE",
    ir.DataType.UINT8: "INT16 UINT16 INT32 UINT32 INT64 UINT64 FLOAT16 FLOAT DOUBLE",
    ir.DataType.INT16: "INT32 INT64 FLOAT DOUBLE",
    ir.DataType.UINT16: "INT32 UINT32 INT64 UINT64 FLOAT DOUBLE",
    ir.DataType.INT32: "INT64 DOUBLE",
    ir.DataType.UINT32: "INT64 UINT64 DOUBLE",
    ir.DataType.FLOAT16: "FLOAT DOUBLE",
    ir.DataType.BFLOAT16: "FLOAT DOUBLE",
    ir.DataType.FLOAT: "DOUBLE",
}


def merge_casts(node: ir.Node) -> bool:
    """Cast from where the previous Cast did, when that one lost nothing."""
    value = node.inputs[0] if is_op(node, "Cast") else None
    before = None if value is None else value.producer()
    if before is None or not is_op(before, "Cast"):
        return False
    source = before.inputs[0]
    if source is None or source.dtype is None or value is None or value.dtype is None:
        return False
    if value.dtype.name not in _HOLDS.get(source.dtype, "").split():
        return False
    if node.outputs[0].dtype is ir.DataType.STRING:  # text shows the digits of the type it was made of
        return False
    node.replace_input_with(0, source)
    return True
