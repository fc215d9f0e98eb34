"""Nodes that give back one of their inputs unchanged, bit for bit.

`unchanged` finds the value that a node passes on. The shapes decide for everything that moves data: a Reshape, Expand,
Slice or Tile whose result has the very sizes of its input changes nothing. Arithmetic counts only where it is exact: a
product with 1, a difference with +0, a sum with -0 (x + 0 turns -0 into +0 and is kept), and only where broadcasting
does not change the shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxslim import shape_windows
from onnxslim.graph import attribute, constant, is_op
from onnxslim.shape_moves import pad_amounts, slice_bounds
from onnxslim.shape_rules import Call
from onnxslim.shapes import Shapes

Test: TypeAlias = Callable[[Call, Shapes], "ir.Value | None"]
_TESTS: dict[str, Test] = {}
# Neutral elements are looked for in weights of at most this many elements.
_SMALL = 4096
_INTERPOLATIONS = frozenset({"asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners"})


def unchanged(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """The value that equals the first output of ``node`` (its other outputs being unused), or None."""
    test = _TESTS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if test is None or not node.inputs or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return None
    return test(shapes.call(node), shapes)


def _test(*op_types: str) -> Callable[[Test], Test]:
    def register(function: Test) -> Test:
        _TESTS.update(dict.fromkeys(op_types, function))
        return function

    return register


def _keeps_shape(call: Call, shapes: Shapes, value: ir.Value | None) -> bool:
    shape = shapes.shape(value)
    return shape is not None and shapes.shape(call.node.outputs[0]) == shape


def _first_if(condition: bool, call: Call) -> ir.Value | None:
    return call.node.inputs[0] if condition else None


@_test("Identity")
def _identity(call: Call, shapes: Shapes) -> ir.Value | None:
    return call.node.inputs[0]


@_test("Cast")
def _cast(call: Call, shapes: Shapes) -> ir.Value | None:
    value = call.node.inputs[0]
    return _first_if(value is not None and value.dtype is not None and value.dtype == call.attr("to"), call)


@_test("CastLike")
def _cast_like(call: Call, shapes: Shapes) -> ir.Value | None:
    value, like = call.node.inputs
    return _first_if(
        value is not None and like is not None and value.dtype is not None and value.dtype == like.dtype, call
    )


@_test("Dropout")
def _dropout(call: Call, shapes: Shapes) -> ir.Value | None:
    if call.opset < 7:
        return _first_if(bool(call.attr("is_test", 0)), call)
    if not call.has(2):
        return call.node.inputs[0]
    training = constant(call.node.inputs[2])
    return _first_if(training is not None and not training.any(), call)


@_test("Expand", "Flatten", "Reshape", "Squeeze", "Split", "Tile", "Unsqueeze")
def _view(call: Call, shapes: Shapes) -> ir.Value | None:
    return _first_if(_keeps_shape(call, shapes, call.node.inputs[0]), call)


@_test("Slice")
def _slice(call: Call, shapes: Shapes) -> ir.Value | None:
    parts = slice_bounds(call)
    forward = parts is not None and all(step == 1 for _, _, step in parts.values())
    return _first_if(forward and _keeps_shape(call, shapes, call.node.inputs[0]), call)


@_test("Pad")
def _pad(call: Call, shapes: Shapes) -> ir.Value | None:
    amounts = pad_amounts(call)
    return _first_if(amounts is not None and all(pair == (0, 0) for pair in amounts.values()), call)


@_test("Transpose")
def _transpose(call: Call, shapes: Shapes) -> ir.Value | None:
    shape = call.shape()
    if shape is None:
        perm = call.attr("perm")
        return _first_if(perm is not None and list(perm) == list(range(len(perm))), call)
    perm = call.attr("perm", list(range(len(shape)))[::-1])
    # Axes of size 1 may move: the elements stay in order.
    order = [p for p in perm if shape[p] != 1]
    return _first_if(order == sorted(order) and tuple(shape[p] for p in perm) == shape, call)


@_test("Concat")
def _concat(call: Call, shapes: Shapes) -> ir.Value | None:
    if len(call.node.inputs) == 1:
        return call.node.inputs[0]
    ranked = next((f.shape for f in call.facts if f is not None and f.shape is not None), None)
    if ranked is None:
        return None
    axis = call.attr("axis", 1)
    filled = [
        value
        for value, fact in zip(call.node.inputs, call.facts, strict=True)
        if fact is None or fact.shape is None or fact.shape[axis] != 0
    ]
    return filled[0] if len(filled) == 1 else None


@_test("Resize", "Upsample")
def _resize(call: Call, shapes: Shapes) -> ir.Value | None:
    if not _keeps_shape(call, shapes, call.node.inputs[0]):
        return None
    if call.attr("coordinate_transformation_mode", "half_pixel") not in _INTERPOLATIONS:
        return None
    if call.node.op_type == "Resize" and call.has(3):
        return call.node.inputs[0]
    # A scale of 1.01 may round to the same size and still move every sample.
    scales = shape_windows.resize_scales(call)
    return _first_if(scales is not None and all(scale == 1 for scale in scales), call)


def _is_filled(value: ir.Value | None, number: float, shapes: Shapes, *, negative_zero: bool | None = None) -> bool:
    """True when every element of ``value`` is ``number``; ``negative_zero`` asks for one of the two zeros of floats."""
    content, grid = shapes.content(value), shapes.grid(value)
    if content is not None and value is not None and value.dtype is not None and value.dtype.is_integer():
        return all(isinstance(d, int) and d == number for d in content.reshape(-1))
    if grid is not None:
        return grid.uniform and grid.start == number
    if value is None or value.const_value is None or value.const_value.size > _SMALL:
        return False
    array = constant(value)
    if array is None or array.dtype.kind not in "biuf":
        return False
    if negative_zero is not None and array.dtype.kind == "f" and np.any(np.signbit(array) != negative_zero):
        return False
    return bool(np.all(array == number))


# Per operator: the operand that changes nothing, the sides it may stand on, and which zero it must be in floats.
_NEUTRAL: dict[str, tuple[float, tuple[int, ...], bool | None]] = {
    "Add": (0, (0, 1), True),
    "And": (1, (0, 1), None),
    "Div": (1, (1,), None),
    "Mul": (1, (0, 1), None),
    "Or": (0, (0, 1), None),
    "Pow": (1, (1,), None),
    "Sub": (0, (1,), False),
    "Xor": (0, (0, 1), None),
}


def spread(node: ir.Node, shapes: Shapes) -> ir.Value | None:
    """The value that ``node`` passes on, broadcast to its result's shape and otherwise unchanged, or None."""
    if node.domain not in ("", "ai.onnx") or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Expand":
        return node.inputs[0]
    if node.op_type == "Where":
        condition, yes, no = node.inputs
        return yes if _is_filled(condition, 1, shapes) else no if _is_filled(condition, 0, shapes) else None
    return next(_passed(node, shapes), None)


def _passed(node: ir.Node, shapes: Shapes) -> Iterator[ir.Value]:
    """Operands that meet nothing but neutral elements."""
    number, sides, negative_zero = _NEUTRAL.get(node.op_type, (0, (), None))
    if not sides or any(v is None for v in node.inputs):
        return
    left, right = node.inputs
    if left is None or right is None or (node.op_type == "Pow" and left.dtype != right.dtype):
        return
    for side in sides:
        other = node.inputs[1 - side]
        if other is not None and _is_filled(node.inputs[side], number, shapes, negative_zero=negative_zero):
            yield other


@_test(*_NEUTRAL)
def _neutral(call: Call, shapes: Shapes) -> ir.Value | None:
    return next((v for v in _passed(call.node, shapes) if _keeps_shape(call, shapes, v)), None)


@_test("Where")
def _where(call: Call, shapes: Shapes) -> ir.Value | None:
    condition, yes, no = call.node.inputs
    if yes is no or _is_filled(condition, 1, shapes):
        chosen = yes
    elif _is_filled(condition, 0, shapes):
        chosen = no
    else:
        return None
    return chosen if _keeps_shape(call, shapes, chosen) else None


@_test("Clip")
def _clip(call: Call, shapes: Shapes) -> ir.Value | None:
    return _first_if(call.opset >= 11 and not call.has(1) and not call.has(2), call) or _idempotent(call, shapes)


@_test("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
def _reduce(call: Call, shapes: Shapes) -> ir.Value | None:
    return _first_if(_keeps_shape(call, shapes, call.node.inputs[0]) and _all_ones(call), call)


def _all_ones(call: Call) -> bool:
    """True when every reduced axis has size 1."""
    shape = call.shape()
    axes = call.param("axes", 1)
    if shape is None or (axes is None and call.has(1)):
        return False
    if not axes:
        return bool(call.attr("noop_with_empty_axes", 0)) or all(d == 1 for d in shape)
    return all(shape[a] == 1 for a in axes)


@_test("Max", "Mean", "Min", "Sum")
def _variadic(call: Call, shapes: Shapes) -> ir.Value | None:
    return _first_if(len(call.node.inputs) == 1, call)


@_test("AveragePool", "MaxPool")
def _pool(call: Call, shapes: Shapes) -> ir.Value | None:
    plain = (
        all(k == 1 for k in call.attr("kernel_shape") or [0])
        and all(s == 1 for s in call.attr("strides") or ())
        and not any(call.attr("pads") or ())
    )
    return _first_if(plain, call)


@_test("DepthToSpace", "SpaceToDepth")
def _blocks(call: Call, shapes: Shapes) -> ir.Value | None:
    return _first_if(call.attr("blocksize") == 1, call)


@_test("Gather")
def _gather(call: Call, shapes: Shapes) -> ir.Value | None:
    shape, indices = call.shape(), call.content(1)
    if shape is None or indices is None or indices.ndim != 1:
        return None
    size = shape[call.attr("axis", 0)]
    return _first_if(size == indices.size and all(i == k for k, i in enumerate(indices)), call)


@_test("Abs", "Ceil", "Floor", "Relu", "Round", "Sign")
def _idempotent(call: Call, shapes: Shapes) -> ir.Value | None:
    """The same operator, with the same parameters, has been applied already."""
    value = call.node.inputs[0]
    before = None if value is None else value.producer()
    if before is None or not is_op(before, call.node.op_type) or list(before.inputs[1:]) != list(call.node.inputs[1:]):
        return None
    same = {k: attribute(before, k) for k in before.attributes} == {k: call.attr(k) for k in call.node.attributes}
    return _first_if(same, call)


@_test("Neg", "Not")
def _involution(call: Call, shapes: Shapes) -> ir.Value | None:
    """Applied twice, nothing is left."""
    value = call.node.inputs[0]
    before = None if value is None else value.producer()
    return before.inputs[0] if before is not None and is_op(before, call.node.op_type) else None
