"""Output shapes, and contents of small integer tensors, operator by operator.

A rule takes a `Call` (a node with what is known about its inputs) and returns one `Fact` per output, leading ones
first; None stands for an output about which nothing is known. Contents are object arrays of `symbolic.Dim`: the
operators that only move data are run on them as they are.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxslim import symbolic
from onnxslim.graph import attribute
from onnxslim.symbolic import Dim

Shape: TypeAlias = tuple[Dim, ...]
# Contents with more elements than this are not followed: shape arithmetic is short.
MAX_CONTENT = 256
# Slice ends at or beyond this mean "to the end" in every exporter.
FAR = 2**31 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Grid:
    """Integers that grow evenly: the element at (i, j, ...) is ``start + steps[0] i + steps[1] j + ...``.

    Booleans are 0 and 1. The step of an axis of size 1 is 0.
    """

    start: Dim
    steps: tuple[Dim, ...]

    @property
    def uniform(self) -> bool:
        """All elements are equal."""
        return all(step == 0 for step in self.steps)


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """What is known about a tensor: its shape (None: not even the rank) and, if it is small, its content.

    Contents are whole numbers, of integer, boolean or float tensors; a zero of a float tensor may have either sign.
    ``grid`` says what integers and booleans of any number are when they grow evenly along the axes.
    """

    shape: Shape | None
    content: np.ndarray | None = None
    grid: Grid | None = None


NOTHING = Fact(None)


class Call:
    """A node together with the facts of its inputs (None for an absent one)."""

    __slots__ = ("facts", "node", "opset")

    def __init__(self, node: ir.Node, facts: Sequence[Fact | None], opset: int) -> None:
        self.node = node
        self.facts = facts
        self.opset = opset

    def attr(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        return attribute(self.node, name, default)

    def has(self, index: int) -> bool:
        """True when the input is given."""
        return index < len(self.facts) and self.facts[index] is not None

    def shape(self, index: int = 0) -> Shape | None:
        """Shape of an input."""
        fact = self.facts[index] if index < len(self.facts) else None
        return None if fact is None else fact.shape

    def content(self, index: int = 0) -> np.ndarray | None:
        """Content of an input."""
        fact = self.facts[index] if index < len(self.facts) else None
        return None if fact is None else fact.content

    def dims(self, index: int) -> list[Dim] | None:
        """The content of a vector (or scalar) input as a list."""
        content = self.content(index)
        return None if content is None else list(content.reshape(-1))

    def ints(self, index: int) -> list[int] | None:
        """The content of a vector input when all of it is numbers."""
        dims = self.dims(index)
        return None if dims is None or not all(isinstance(d, int) for d in dims) else [int(d) for d in dims]  # type: ignore[arg-type]

    def param(self, name: str, index: int) -> list[int] | None:
        """A list of integers that older opsets give as an attribute and newer ones as an input; None: unknown."""
        return self.ints(index) if self.has(index) else self.attr(name)


Rule: TypeAlias = Callable[[Call], Sequence[Fact | None]]
RULES: dict[str, Rule] = {}


def rule(*op_types: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of the standard domain, or of another one written before them: ``domain::Name``."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(op_types, function))
        return function

    return register


def anything(rank: int) -> Shape:
    """A shape of which only the rank is known."""
    return tuple(symbolic.unknown(0) for _ in range(rank))


def as_content(values: Any, shape: Shape) -> np.ndarray | None:
    """An object array of a given shape, or None when the shape is not made of numbers or too large."""
    numbers = [d for d in shape if isinstance(d, int)]
    if len(numbers) < len(shape) or math.prod(numbers) > MAX_CONTENT:
        return None
    result = np.full(numbers, None, object)
    result.reshape(-1)[:] = list(values)
    return result


def each(function: Callable[..., Dim | None], *arrays: np.ndarray) -> np.ndarray:
    """``function`` applied element by element to object arrays, broadcast against each other."""
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*arrays), object)


def moved(call: Call, shape: Shape | None, move: Callable[[np.ndarray], np.ndarray]) -> list[Fact]:
    """The fact of a data movement: ``move`` applied to the content when there is one."""
    content = call.content()
    if content is None:
        return [Fact(shape)]
    result = np.asarray(move(content), object)
    return [Fact(result.shape, result if result.size <= MAX_CONTENT else None)]


def axis_of(axis: int, rank: int) -> int:
    """A possibly negative axis counted from the front."""
    return axis + rank if axis < 0 else axis


SHAPE_OF_FIRST_INPUT = """
    Acos Acosh Asin Asinh Atan Atanh BatchNormalization Bernoulli BitwiseNot Celu Clip Cos Cosh CumProd CumSum
    DequantizeLinear Dropout Elu Erf Exp EyeLike Gelu GroupNormalization HardSigmoid HardSwish Hardmax
    InstanceNormalization IsInf IsNaN LRN LayerNormalization LeakyRelu Log LogSoftmax LpNormalization
    MeanVarianceNormalization Mish PRelu QuantizeLinear RMSNormalization RandomNormalLike RandomUniformLike
    Reciprocal Relu ReverseSequence RotaryEmbedding Scatter ScatterElements ScatterND Selu Shrink Sigmoid Sin
    Sinh Softmax Softplus Softsign Sqrt Swish Tan Tanh TensorScatter ThresholdedRelu Trilu
"""


def same_shape(call: Call) -> Sequence[Fact | None]:
    """The first output has the shape of the first input."""
    return [Fact(call.shape())]


RULES.update(dict.fromkeys(SHAPE_OF_FIRST_INPUT.split(), same_shape))


@rule("Shape")
def shape_of(call: Call) -> Sequence[Fact | None]:
    """The sizes themselves."""
    shape = call.shape()
    if shape is None:
        return [Fact(anything(1))]
    part = shape[slice(call.attr("start", 0), call.attr("end"))]
    return [Fact((len(part),), as_content(part, (len(part),)))]


@rule("Size")
def size_of(call: Call) -> Sequence[Fact | None]:
    """The number of elements."""
    shape = call.shape()
    return [Fact((), None if shape is None else as_content([symbolic.product(shape)], ()))]


@rule("ReduceSum", "ReduceProd", "ReduceMax", "ReduceMin")
def reduce_content(call: Call) -> Sequence[Fact | None]:
    """Reductions that shape arithmetic uses."""
    fact = reduce(call)[0]
    content, axes = call.content(), _reduced_axes(call)
    if content is None or axes is None or fact is None or not content.size:
        return [fact]
    function = {
        "ReduceSum": operator.add,
        "ReduceProd": operator.mul,
        "ReduceMax": symbolic.maximum,
        "ReduceMin": symbolic.minimum,
    }[call.node.op_type]
    result: Any = content
    keep = bool(call.attr("keepdims", 1))
    for axis in sorted(axes, reverse=True):
        rows = np.moveaxis(result, axis, 0)
        total: Any = rows[0]
        for row in rows[1:]:
            total = each(function, np.asarray(total, object), np.asarray(row, object))
        total = np.asarray(total, object)
        result = np.expand_dims(total, axis) if keep else total
    return [Fact(result.shape, result)]


def _reduced_axes(call: Call) -> list[int] | None:
    shape = call.shape()
    if shape is None:
        return None
    axes = call.param("axes", 1)
    if axes is None and call.has(1):
        return None
    if not axes:
        return [] if call.attr("noop_with_empty_axes", 0) else list(range(len(shape)))
    return [axis_of(a, len(shape)) for a in axes]


@rule("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceSumSquare")
def reduce(call: Call) -> Sequence[Fact | None]:
    """The reduced axes become 1 or go."""
    shape, axes = call.shape(), _reduced_axes(call)
    keep = bool(call.attr("keepdims", 1))
    if shape is None:
        return [NOTHING]
    if axes is None:
        return [Fact(anything(len(shape)))] if keep else [NOTHING]
    if keep:
        return [Fact(tuple(1 if k in axes else d for k, d in enumerate(shape)))]
    return [Fact(tuple(d for k, d in enumerate(shape) if k not in axes))]


@rule("ArgMax", "ArgMin")
def arg(call: Call) -> Sequence[Fact | None]:
    """One axis becomes 1 or goes."""
    shape = call.shape()
    if shape is None:
        return [NOTHING]
    axis = axis_of(call.attr("axis", 0), len(shape))
    middle: Shape = (1,) if call.attr("keepdims", 1) else ()
    return [Fact((*shape[:axis], *middle, *shape[axis + 1 :]))]


@rule("ConstantOfShape")
def constant_of_shape(call: Call) -> Sequence[Fact | None]:
    """The content of the input is the shape."""
    dims = call.dims(0)
    if dims is None:
        length = call.shape()
        return [Fact(anything(length[0])) if length and isinstance(length[0], int) else NOTHING]
    shape = tuple(d if symbolic.nonnegative(d) else symbolic.unknown(0) for d in dims)
    value = call.node.attributes.get("value")
    filler: Any = 0
    if value is not None:
        tensor = value.as_tensor()
        if tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
            return [Fact(shape)]
        filler = int(tensor.numpy().reshape(-1)[0])
    else:
        return [Fact(shape)]  # the default is float
    numbers = [d for d in shape if isinstance(d, int)]
    small = len(numbers) == len(shape) and math.prod(numbers) <= MAX_CONTENT
    return [Fact(shape, as_content([filler] * math.prod(numbers), shape) if small else None)]


@rule("Range")
def range_(call: Call) -> Sequence[Fact | None]:
    """ceil((limit - start) / delta) numbers."""
    contents = [call.dims(k) for k in range(3)]
    if any(c is None for c in contents):
        return [Fact(anything(1))]
    start, limit, delta = (c[0] for c in contents if c)
    if all(isinstance(v, int) for v in (start, limit, delta)) and delta:
        numbers = range(start, limit, delta)  # type: ignore[arg-type]
        return [Fact((len(numbers),), as_content(numbers, (len(numbers),)) if len(numbers) <= MAX_CONTENT else None)]
    if not isinstance(delta, int) or delta <= 0:
        return [Fact(anything(1))]
    return [Fact((symbolic.maximum(symbolic.floor_divide(limit - start + (delta - 1), delta), 0),))]


@rule("NonZero")
def nonzero(call: Call) -> Sequence[Fact | None]:
    """One row per axis, as many columns as there are elements that are not zero."""
    shape = call.shape()
    # Of a scalar the specification makes no row, and runtimes one.
    return [Fact((len(shape) if shape else symbolic.unknown(0), symbolic.unknown(0)))]


@rule("OneHot")
def one_hot(call: Call) -> Sequence[Fact | None]:
    """A new axis of the given depth."""
    shape, depth = call.shape(), call.dims(1)
    if shape is None:
        return [NOTHING]
    axis = axis_of(call.attr("axis", -1), len(shape) + 1)
    size = depth[0] if depth else symbolic.unknown(0)
    return [Fact((*shape[:axis], size, *shape[axis:]))]


@rule("TopK")
def top_k(call: Call) -> Sequence[Fact | None]:
    """The chosen axis has size k; two outputs."""
    shape = call.shape()
    if shape is None:
        return [NOTHING, NOTHING]
    axis = axis_of(call.attr("axis", -1), len(shape))
    sizes = call.dims(1) if call.has(1) else [call.attr("k")] if call.attr("k") is not None else None
    size = sizes[0] if sizes else symbolic.unknown(0)
    fact = Fact((*shape[:axis], size, *shape[axis + 1 :]))
    return [fact, fact]
