"""Output shapes and contents of elementwise operators: what broadcasts, what converts, what chooses."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import symbolic
from onnxslim.shape_rules import Call, Fact, Shape, each, rule
from onnxslim.symbolic import Dim


def _comparison(test: Callable[[int], bool]) -> Callable[[Dim, Dim], Dim]:
    """A comparison of two numbers, decided where the difference has a bound that decides it."""

    def compare(a: Dim, b: Dim) -> Dim:
        difference = a - b
        if isinstance(difference, int):
            return int(test(difference))
        low, high = symbolic.bounds(difference)
        if low is not None and low >= 0 and test(low) == test(low + 1):
            return int(test(low + 1))
        if high is not None and high <= 0 and test(high) == test(high - 1):
            return int(test(high - 1))
        return symbolic.unknown(0, 1)

    return compare


def _logical(known: Callable[[bool, bool], bool], absorbing: int) -> Callable[[Dim, Dim], Dim]:
    def combine(a: Dim, b: Dim) -> Dim:
        if isinstance(a, int) and isinstance(b, int):
            return int(known(bool(a), bool(b)))
        if absorbing in (a, b):
            return absorbing
        if isinstance(a, int) or isinstance(b, int):
            return b if isinstance(a, int) else a
        return a if a == b else symbolic.unknown(0, 1)

    return combine


def _mod(a: Dim, b: Dim) -> Dim:
    if isinstance(a, int) and isinstance(b, int) and b:
        return a % b
    if b == 0 or symbolic.sign(b) != 1:
        return symbolic.unknown()
    return a - b * symbolic.floor_divide(a, b)


def _truncate(a: Dim, b: Dim) -> Dim:
    return symbolic.unknown() if b == 0 else symbolic.truncate_divide(a, b)


def _divide(a: Dim, b: Dim) -> Dim | None:
    """The quotient of floating-point numbers, where it is known to be whole."""
    return symbolic.quotient([a], [b])


BINARY: dict[str, Callable[[Dim, Dim], Dim]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _truncate,
    "Mod": _mod,
    "Min": symbolic.minimum,
    "Max": symbolic.maximum,
    "Sum": operator.add,
    "And": _logical(operator.and_, 0),
    "Or": _logical(operator.or_, 1),
    "Equal": _comparison(lambda d: d == 0),
    "Less": _comparison(lambda d: d < 0),
    "LessOrEqual": _comparison(lambda d: d <= 0),
    "Greater": _comparison(lambda d: d > 0),
    "GreaterOrEqual": _comparison(lambda d: d >= 0),
}


BROADCAST = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min
    Mod Mul Or Pow Sub Sum Xor
"""


@rule(*BROADCAST.split())
def elementwise(call: Call) -> Sequence[Fact | None]:
    """Operators with any number of inputs, broadcast against each other."""
    shapes = [fact.shape for fact in call.facts if fact is not None]
    if call.opset < 7 and call.node.op_type not in ("Max", "Mean", "Min", "Sum"):
        return [Fact(shapes[0])]  # the second operand is stretched to the first
    shape = broadcast_shapes(shapes)
    contents = [fact.content for fact in call.facts if fact is not None and fact.content is not None]
    function: Callable[[Dim, Dim], Dim | None] | None = BINARY.get(call.node.op_type)
    if call.node.op_type == "Div" and call.node.outputs[0].dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        function = _divide
    if function is None or len(contents) < len(shapes) or (call.node.op_type == "Mod" and call.attr("fmod", 0)):
        return [Fact(shape)]
    result = contents[0]
    for other in contents[1:]:
        result = each(function, result, other)
        if any(d is None for d in result.reshape(-1)):
            return [Fact(shape)]
    return [Fact(shape, result)]


def broadcast_shapes(shapes: Sequence[Shape | None]) -> Shape | None:
    """Shape of an elementwise result."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes):
        return None
    rank = max(map(len, known), default=0)
    result: list[Dim] = [1] * rank
    for shape in known:
        for k, dim in enumerate(shape, rank - len(shape)):
            result[k] = symbolic.broadcast(result[k], dim)
    return tuple(result)


# A tensor has no more sizes than this.
_SIZES = 8


def _itself(a: Dim) -> Dim:
    return a


UNARY: dict[str, Callable[[Dim], Dim]] = {
    "Ceil": _itself,
    "Floor": _itself,
    "Round": _itself,
    "Abs": lambda a: a if symbolic.nonnegative(a) else -a if symbolic.nonnegative(-a) else symbolic.unknown(0),
    "Neg": operator.neg,
    "Not": lambda a: int(not a) if isinstance(a, int) else 1 - a,
    "Sign": lambda a: symbolic.unknown(-1, 1) if symbolic.sign(a) is None else symbolic.sign(a) or 0,
}


@rule(*UNARY)
def unary(call: Call) -> Sequence[Fact | None]:
    """Elementwise operators of one input that shape arithmetic uses."""
    content = call.content()
    if content is None:
        shape = call.shape()
        return [Fact(shape, _some(shape) if call.node.op_type in ("Ceil", "Floor", "Round") else None)]
    return [Fact(content.shape, each(UNARY[call.node.op_type], content))]


def _some(shape: Shape | None) -> np.ndarray | None:
    """Whole numbers that nothing is known of, for a vector of sizes: those that join it stay known."""
    if shape is None or len(shape) > 1 or not all(isinstance(d, int) and d <= _SIZES for d in shape):
        return None
    return each(lambda _: symbolic.unknown(), np.zeros([int(d) for d in shape]))  # type: ignore[arg-type]


# Types whose contents are followed, and the whole numbers they hold exactly.
RANGES = {
    ir.DataType.INT64: (-(2**63), 2**63 - 1),
    ir.DataType.INT32: (-(2**31), 2**31 - 1),
    ir.DataType.BOOL: (0, 1),
    ir.DataType.FLOAT: (-(2**24), 2**24),
    ir.DataType.DOUBLE: (-(2**53), 2**53),
}


@rule("Cast", "CastLike")
def cast(call: Call) -> Sequence[Fact | None]:
    """Whole numbers stay what they are where the new type holds them; sizes of tensors fit in 24 bits."""
    content = call.content()
    to = call.node.outputs[0].dtype if call.node.op_type == "CastLike" else ir.DataType(call.attr("to"))
    if content is None or to is None:
        shape = call.shape()
        return [Fact(shape, _some(shape) if to in (ir.DataType.INT64, ir.DataType.INT32) else None)]
    if to is ir.DataType.BOOL:
        return [Fact(content.shape, each(_truth, content))]
    if to not in RANGES:
        return [Fact(content.shape)]
    low, high = RANGES[to]
    inside = all(not isinstance(d, int) or low <= d <= high for d in content.reshape(-1))
    return [Fact(content.shape, content if inside else None)]


def _truth(dim: Dim) -> Dim:
    if isinstance(dim, int):
        return int(dim != 0)
    if symbolic.bounds(dim) == (0, 1):
        return dim
    return 1 if symbolic.sign(dim) in (-1, 1) else symbolic.unknown(0, 1)


@rule("Identity")
def identity(call: Call) -> Sequence[Fact | None]:
    """Everything stays."""
    return [call.facts[0]]


@rule("Where")
def where(call: Call) -> Sequence[Fact | None]:
    """Element by element, decided where the condition is."""
    shape = broadcast_shapes([call.shape(k) for k in range(3)])
    contents = [c for c in (call.content(k) for k in range(3)) if c is not None]
    if len(contents) < 3:
        return [Fact(shape)]

    def choose(condition: Dim, yes: Dim, no: Dim) -> Dim:
        if isinstance(condition, int):
            return yes if condition else no
        if yes == no:
            return yes
        return symbolic.unknown(0 if symbolic.nonnegative(yes) and symbolic.nonnegative(no) else None)

    return [Fact(shape, each(choose, *contents))]
