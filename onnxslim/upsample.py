"""Resize that repeats pixels, of copies of whole rows.

ONNX Runtime's integer convolutions keep the channels last, and with them all that lies between. Its Resize looks up
every element there, several times as slowly as it copies rows of an image whose channels come first. Concatenating a
tensor with itself and reading the result with another shape repeats pixels in any layout at the speed of copying.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g

_HALF = Fraction(1, 2)
# Of the specification of Resize (opset 19): where element k of an axis enlarged s times is read, and how it is rounded.
_READS: dict[str, Callable[[int, int], Fraction]] = {
    "asymmetric": lambda k, s: Fraction(k, s),
    "half_pixel": lambda k, s: (k + _HALF) / s - _HALF,
    "half_pixel_symmetric": lambda k, s: (k + _HALF) / s - _HALF,
    "pytorch_half_pixel": lambda k, s: (k + _HALF) / s - _HALF,
    "tf_half_pixel_for_nn": lambda k, s: (k + _HALF) / s,
}
_ROUNDS: dict[str, Callable[[Fraction], int]] = {
    "round_prefer_floor": lambda x: math.ceil(x - _HALF),
    "round_prefer_ceil": lambda x: math.floor(x + _HALF),
    "floor": math.floor,
    "ceil": math.ceil,
}


def repeats(node: ir.Node) -> tuple[int, int] | None:
    """How often a Resize of an image (n, c, h, w) repeats every row and every column; None where it does not.

    Opset 11 or newer; the number of channels must be known.
    """
    source = node.inputs[0] if node.inputs else None
    shape = g.known_shape(source)
    if not g.is_op(node, "Resize") or shape is None or len(shape) != 4 or shape[1] is None:
        return None
    if g.attribute(node, "mode", "nearest") != "nearest":
        return None
    if g.attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return None
    factors = _factors(node, shape)
    if factors is None or factors[:2] != [1, 1] or factors[2:] == [1, 1]:
        return None
    reads = _READS.get(str(g.attribute(node, "coordinate_transformation_mode", "half_pixel")))
    rounds = _ROUNDS[str(g.attribute(node, "nearest_mode", "round_prefer_floor"))]
    if reads is None or any(rounds(reads(s + r, s)) != 1 for s in factors for r in range(s)):
        return None
    return factors[2], factors[3]


def _factors(node: ir.Node, shape: tuple[int | None, ...]) -> list[int] | None:
    """By what each axis of an image grows, if by whole numbers that are known."""
    axes = [int(a) % 4 for a in g.attribute(node, "axes", range(4))]
    scales, sizes = (g.constant(node.inputs[k]) if len(node.inputs) > k else None for k in (2, 3))
    found = [Fraction(1)] * 4
    if sizes is not None and sizes.size:
        for axis, size in zip(axes, sizes.tolist(), strict=True):
            known = shape[axis]
            if not known:
                return None
            found[axis] = Fraction(size, known)
    elif scales is not None and scales.size:
        for axis, scale in zip(axes, scales.tolist(), strict=True):
            found[axis] = Fraction(scale)
    else:
        return None
    return [int(f) for f in found] if all(f.denominator == 1 and f >= 1 for f in found) else None


def by_copying(graph: ir.Graph, value: ir.Value, times: tuple[int, int], before: ir.Node, hint: str) -> ir.Value:
    """``value`` (n, c, h, w) with every row and column repeated ``times``, computed in front of ``before``."""
    _, channels, height, width = g.known_shape(value) or (None,) * 4
    down, across = times
    assert channels is not None

    def add(op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        result = g.add_node(graph, op_type, inputs, before=before, attributes=attributes, hint=hint).outputs[0]
        result.type = value.type
        return result

    def number(kind: str, *dims: int) -> ir.Value:
        return g.add_constant(graph, f"{hint}_{kind}", np.array(dims, np.int64))

    last = image = add("Transpose", value, perm=[0, 2, 3, 1])
    if across > 1:
        last = add("Concat", *[last] * across, axis=3)  # pixel by pixel
        last = add("Reshape", last, number("pixels", 0, 0, -1, channels))
    if down > 1:
        last = add("Concat", *[last] * down, axis=2)  # row by row
        if height is not None:
            form = number("rows", 0, height * down, -1, channels)
        elif width is not None:
            form = number("rows", 0, -1, width * across, channels)
        else:
            sizes = add("Shape", image)
            sizes.type = ir.TensorType(ir.DataType.INT64)
            form = add("Mul", sizes, number("times", 1, down, across, 1))
            form.type = sizes.type
        last = add("Reshape", last, form)
    return add("Transpose", last, perm=[0, 3, 1, 2])
