"""Elementwise nodes with constants, read as one affine map ``y = scale * x + offset``.

Mul, Div by a constant, Add, Sub in both directions, Neg and inference BatchNormalization are all of this form, and so
is any chain of them: ``c * (a x + b) + d = (c a) x + (c b + d)``, whatever the shapes that broadcast. A chain is
composed in float64 and rounded once, when it is written back.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import FLOATS, Read, along, batchnorm_statistics, inference_batchnorm

# Constants above this many elements (position tables) are left in their node: copies in float64 would cost memory.
LARGEST = 1 << 22
# Bits of the significand, largest exponent.
_FORMATS = {
    ir.DataType.FLOAT16: (11, 15),
    ir.DataType.BFLOAT16: (8, 127),
    ir.DataType.FLOAT: (24, 127),
    ir.DataType.DOUBLE: (53, 1023),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """A chain of nodes from ``x`` to ``y`` with the scale and offset it amounts to, broadcast like their constants."""

    nodes: tuple[ir.Node, ...]
    x: ir.Value
    scale: np.ndarray
    offset: np.ndarray
    largest_offset: float

    @property
    def y(self) -> ir.Value:
        """The result of the last node."""
        return self.nodes[-1].outputs[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that all constants of the chain broadcast to."""
        return np.broadcast_shapes(self.scale.shape, self.offset.shape)

    @property
    def scales(self) -> bool:
        """Whether the scale does anything."""
        return bool(np.any(self.scale != 1.0))

    @property
    def shifts(self) -> bool:
        """Whether the offset does anything."""
        return bool(np.any(self.offset != 0.0))

    def then(self, after: Affine) -> Affine:
        """This map followed by another."""
        return Affine(
            self.nodes + after.nodes,
            self.x,
            after.scale * self.scale,
            after.scale * self.offset + after.offset,
            max(self.largest_offset * float(np.max(np.abs(after.scale), initial=0.0)), after.largest_offset),
        )

    def finite(self) -> bool:
        """False when a product of constants left the range of float64, or a constant was infinite to begin with."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.offset).all())

    def rounds_on_purpose(self, dtype: ir.DataType) -> bool:
        """True when large offsets cancel: ``(x + 1.5 * 2**23) - 1.5 * 2**23`` rounds x to an integer in float32."""
        return self.largest_offset >= large(dtype) and self.largest_offset > 16 * float(
            np.max(np.abs(self.offset), initial=0.0)
        )


@dataclasses.dataclass(frozen=True)
class Limits:
    """Distance of 1 to the next number, and the lowest finite number, of a float type."""

    eps: float
    lowest: float


def limits(dtype: ir.DataType) -> Limits:
    """The `Limits` of a float type."""
    bits, exponent = _FORMATS[dtype]
    eps = 2.0 ** (1 - bits)
    return Limits(eps, -(2 - eps) * 2.0**exponent)


def large(dtype: ir.DataType) -> float:
    """Numbers from here on may be meant to round what they are added to."""
    return 1.0 / limits(dtype).eps / 16


def affine(node: ir.Node, read: Read, rank: int | None = None) -> Affine | None:
    """``node`` as an affine map of its one computed input, or None.

    ``rank`` is that of the input, for BatchNormalization, whose vectors lie on axis 1; taken from the inferred shape
    when not given.
    """
    if inference_batchnorm(node):
        return _batchnorm(node, read, rank)
    if g.is_op(node, "Neg"):
        x = node.inputs[0]
        if x is None or x.dtype not in FLOATS:
            return None
        return Affine((node,), x, np.array(-1.0), np.array(0.0), 0.0)
    if not g.is_op(node, "Mul", "Div", "Add", "Sub") or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if left is None or right is None or g.is_constant(left) == g.is_constant(right):
        return None
    x, c = (right, left) if g.is_constant(left) else (left, right)
    if c.dtype not in FLOATS or c.const_value is None or c.const_value.size > LARGEST:
        return None
    constant = read(c)
    one, zero = np.array(1.0), np.array(0.0)
    match node.op_type:
        case "Mul":
            scale, offset = constant, zero
        case "Div":
            if x is right or not np.all(constant):
                return None
            scale, offset = 1.0 / constant, zero
        case "Add":
            scale, offset = one, constant
        case _:
            scale, offset = (one, -constant) if x is left else (-one, constant)
    found = Affine((node,), x, scale, offset, float(np.max(np.abs(offset), initial=0.0)))
    return found if constant.size and found.finite() else None


def _batchnorm(node: ir.Node, read: Read, rank: int | None) -> Affine | None:
    x, weight, bias = node.inputs[:3]
    assert x is not None and weight is not None and bias is not None
    shape = g.known_shape(x)
    rank = len(shape) if shape is not None else rank
    if rank is None or rank < 2:
        return None
    mean, factor = batchnorm_statistics(node, read)
    scale = read(weight) * factor
    offset = read(bias) - mean * scale
    spread = (-1, *(1,) * (rank - 2))
    # The mean comes from the data: it is no offset that somebody added.
    found = Affine((node,), x, scale.reshape(spread), offset.reshape(spread), 0.0)
    return found if found.finite() else None


def rounding(steps: Sequence[Affine]) -> set[int]:
    """Which of these single nodes in a row round on purpose, by an offset so large and one that takes it away again.

    Their sum must not be formed, nor that of one of them and what stands beside it.
    """
    dtype = next((v.dtype for s in steps for v in s.nodes[0].inputs if v is not None and g.is_constant(v)), None)
    if dtype not in FLOATS or dtype is None or all(s.largest_offset < large(dtype) for s in steps):
        return set()
    found: set[int] = set()
    for last, chain in enumerate(steps):
        for first in range(last - 1, max(found, default=-1), -1):
            chain = steps[first].then(chain)
            if chain.rounds_on_purpose(dtype):
                found.update(range(first, last + 1))
                break
    return found


def chain_after(value: ir.Value, read: Read, axis: int, channels: int, rank: int) -> list[Affine]:
    """The affine chains behind ``value``, shortest first: read by nobody else, varying along ``axis`` alone."""
    steps: list[Affine] = []
    # The rank of a product is the smallest it can be, which does not tell where axis 1 is.
    certain = None if g.is_op(value.producer(), "MatMul") else rank
    while True:
        node, producer = g.only_user(value), value.producer()
        if node is None or producer is None or node.graph is not producer.graph:
            break
        step = affine(node, read, certain)
        if step is None or not _per_channel(step, axis, channels, rank):
            break
        steps.append(step)
        value = step.y
    return list(itertools.accumulate(steps[: min(rounding(steps), default=None)], Affine.then))


def chain_before(value: ir.Value, read: Read) -> list[Affine]:
    """The affine chains that end at ``value``, longest first; all but ``value`` itself is read by nobody else."""
    steps: list[Affine] = []
    at: ir.Value | None = value
    while at is not None:
        node = at.producer()
        if node is None or (steps and (g.only_user(at) is None or node.graph is not steps[0].nodes[0].graph)):
            break
        step = affine(node, read)
        if step is None or protected(node):
            break
        steps.append(step)
        at = step.x
    # Behind the last that rounds.
    steps = steps[: len(steps) - 1 - max(rounding(steps[::-1]), default=-1)]
    return list(itertools.accumulate(steps, lambda chain, step: step.then(chain)))[::-1]


def keeps_shape(chain: Affine) -> bool:
    """True when the constants of ``chain`` cannot broadcast its input to a larger shape."""
    if not chain.shape:
        return True
    shape = g.known_shape(chain.x)
    if shape is None or len(shape) < len(chain.shape):
        return False
    return all(c in (1, d) for c, d in zip(chain.shape[::-1], shape[::-1], strict=False))


def protected(node: ir.Node) -> bool:
    """True for the constants inside a GELU or at the end of a decomposed layer or RMS normalization.

    ONNX Runtime runs the whole pattern as one kernel, which it no longer finds when these nodes are folded away.
    """
    if not g.is_op(node, "Mul", "Add", "Div", "Sub"):
        return False
    x = next((v for v in node.inputs if not g.is_constant(v)), None)
    producer = x.producer() if x is not None else None
    if producer is not None and g.is_op(producer, "Cast"):
        inner = producer.inputs[0]
        producer = inner.producer() if inner is not None else None
    if producer is None or not g.is_op(producer, "Mul", "Div", "Add"):
        return False
    if any(g.is_constant(v) for v in producer.inputs):
        # The offset (beta) that follows a protected scale (gamma).
        return g.is_op(node, "Add") and g.is_op(producer, "Mul") and protected(producer)
    operands = [v.producer() for v in producer.inputs if v is not None]
    if g.is_op(producer, "Div"):
        return g.is_op(operands[-1], "Sqrt", "Pow")
    return any(_deviation(operand) or _gaussian(operand) for operand in operands)


def _deviation(node: ir.Node | None) -> bool:
    """1 / sqrt(...) of computed values."""
    return g.is_op(node, "Reciprocal", "Pow") or (
        node is not None and g.is_op(node, "Div") and g.is_constant(node.inputs[0])
    )


def _gaussian(node: ir.Node | None) -> bool:
    """1 + erf(...) or 1 + tanh(...)."""
    if node is None or not g.is_op(node, "Add"):
        return False
    return any(v is not None and g.is_op(v.producer(), "Erf", "Tanh") for v in node.inputs)


def _per_channel(step: Affine, axis: int, channels: int, rank: int) -> bool:
    return all(along(a, axis, channels, rank) is not None for a in (step.scale, step.offset))
