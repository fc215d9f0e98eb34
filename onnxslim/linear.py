"""One view of every operator that is linear in one of its inputs: ``y = gain * W x + b``, channel by channel.

Conv, ConvTranspose, Gemm, MatMul and inference BatchNormalization differ in where they keep the weight, which of its
axes is the output channel, and whether they have room for a bias. `view` describes a node so that algebra is written
once: the weight as a float array ``(groups, out / groups, in / groups, taps)``, the bias as a vector ``(out,)``.
Normalizations (InstanceNormalization, LayerNormalization, RMSNormalization) end in a per-channel affine map, so their
output side fits the same view; ``linear_input`` is False for them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
Read = Callable[[ir.Value], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """A node as a linear map along one axis of its data input.

    Attributes:
        data, weight: indices of these inputs of ``node``.
        bias: index of the bias input, also when it is absent; None when the operator has no such input.
        groups: the weight is block-diagonal with this many blocks.
        outputs, inputs: channels of the result and of the data input, all groups together.
        out_axis, in_axis: where these channels are, counted from the last axis (-1).
        rank: rank of the result; for MatMul on data of unknown rank the smallest it can be.
        kernel: sizes of the taps (Conv), or the leading axes of a stacked MatMul weight; empty for a plain matrix.
        out_last: the weight of Gemm or MatMul ends with the output channel, not with the input channel.
        uniform: adding a constant per channel to the data adds a constant per channel to the result. False with zero
            padding, whose zeros the constant would not reach.
        linear_input: False when only the output side is linear (normalizations).
        gain: factor of ``W x``, a number or one per output channel (Gemm alpha, 1 / sqrt(var + eps)).
        shift: what is subtracted from the data first, (out,) (BatchNormalization mean) or 0.
        bias_gain: factor of the stored bias (Gemm beta).
    """

    node: ir.Node
    data: int
    weight: int
    bias: int | None
    groups: int
    outputs: int
    inputs: int
    out_axis: int
    in_axis: int
    rank: int
    kernel: tuple[int, ...] = ()
    out_last: bool = False
    uniform: bool = True
    linear_input: bool = True
    gain: float | np.ndarray = 1.0
    shift: float | np.ndarray = 0.0
    bias_gain: float = 1.0

    @property
    def x(self) -> ir.Value:
        """The data input."""
        value = self.node.inputs[self.data]
        assert value is not None
        return value

    @property
    def w(self) -> ir.Value:
        """The weight, an initializer."""
        value = self.node.inputs[self.weight]
        assert value is not None
        return value

    @property
    def b(self) -> ir.Value | None:
        """The bias input, None when absent."""
        if self.bias is None or self.bias >= len(self.node.inputs):
            return None
        return self.node.inputs[self.bias]

    @property
    def y(self) -> ir.Value:
        """The result."""
        return self.node.outputs[0]

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """``weight`` as (groups, out / groups, in / groups, taps); a view where possible."""
        if self.node.op_type == "Conv":
            return weight.reshape(self.groups, self.outputs // self.groups, self.inputs // self.groups, -1)
        if self.node.op_type == "ConvTranspose":
            blocks = weight.reshape(self.groups, self.inputs // self.groups, self.outputs // self.groups, -1)
            return blocks.swapaxes(1, 2)
        if self.node.op_type in ("Gemm", "MatMul"):
            stack = weight.reshape(-1, *weight.shape[-2:])
            return stack.transpose(2, 1, 0)[None] if self.out_last else stack.transpose(1, 2, 0)[None]
        return weight.reshape(self.groups, 1, 1, 1)

    def layout(self, matrix: np.ndarray) -> np.ndarray:
        """The inverse of `matrix`, for any number of channels."""
        groups, outputs, inputs, _ = matrix.shape
        if self.node.op_type == "Conv":
            return matrix.reshape(groups * outputs, inputs, *self.kernel)
        if self.node.op_type == "ConvTranspose":
            return matrix.swapaxes(1, 2).reshape(groups * inputs, outputs, *self.kernel)
        if self.node.op_type in ("Gemm", "MatMul"):
            stack = matrix[0].transpose(2, 1, 0) if self.out_last else matrix[0].transpose(2, 0, 1)
            return stack.reshape(*self.kernel, *stack.shape[1:])
        return matrix.reshape(-1)

    def bias_vector(self, read: Read) -> np.ndarray | None:
        """What is added to ``gain * W x``, (out,) in float64, or None when it is no constant per output channel."""
        stored = np.zeros(self.outputs)
        if self.b is not None:
            if not g.is_constant(self.b):
                return None
            found: np.ndarray | None = read(self.b)
            if found is not None and self.node.op_type == "Gemm":
                found = along(found, self.out_axis, self.outputs, self.rank)
            if found is None:
                return None
            stored = self.bias_gain * found
        if isinstance(self.shift, np.ndarray):
            stored = stored - self.gain * self.matrix(read(self.w)).reshape(-1) * self.shift
        return stored

    def stored_bias(self, vector: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """The array for the bias input that makes `bias_vector` give ``vector``; the caller sets Gemm's beta to 1."""
        if isinstance(self.shift, np.ndarray):
            vector = vector + self.gain * matrix.reshape(-1) * self.shift
        return vector if self.node.op_type != "Gemm" else self.spread(vector)

    def spread(self, vector: np.ndarray) -> np.ndarray:
        """A vector (out,) with the axes of size 1 that make it broadcast along the output channel."""
        return vector.reshape(-1, *(1,) * (-self.out_axis - 1)) if vector.ndim == 1 else vector


def along(array: np.ndarray, axis: int, channels: int, rank: int) -> np.ndarray | None:
    """``array`` as a vector (channels,) when it broadcasts over a tensor of ``rank`` along ``axis`` (negative) alone.

    None when it varies along another axis, when its size is not the number of channels (it would broadcast the
    tensor), or when it has more axes than the tensor.
    """
    if array.ndim > rank:
        return None
    if array.size == 1:
        return np.full(channels, array.reshape(()), array.dtype)
    position = array.ndim + axis
    if position < 0 or array.shape[position] != channels or array.size != channels:
        return None
    return array.reshape(-1)


def view(node: ir.Node) -> Linear | None:
    """Describe ``node``, or None when it is no such operator or its weight is no float constant."""
    if node.domain not in ("", "ai.onnx"):
        return None
    describe = _VIEWS.get(node.op_type)
    return describe(node) if describe is not None else None


def _constant_float(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a float constant, or None."""
    if value is None or value.const_value is None or not g.is_constant(value):
        return None
    if value.const_value.dtype not in FLOATS:
        return None
    return tuple(value.const_value.shape.numpy())


def _conv(node: ir.Node) -> Linear | None:
    shape = _constant_float(node.inputs[1])
    if shape is None or len(shape) < 3 or node.inputs[0] is None or g.is_constant(node.inputs[0]):
        return None
    groups = g.attribute(node, "group", 1)
    kernel = shape[2:]
    if node.op_type == "Conv":
        outputs, inputs = shape[0], shape[1] * groups
        uniform = not padded(node, kernel)
    else:
        outputs, inputs = shape[1] * groups, shape[0]
        # With a stride, a crop or an output padding, output positions see different sets of taps.
        simple = all(k == 1 for k in kernel) and all(s == 1 for s in g.attribute(node, "strides", [1]))
        uniform = simple and not padded(node, kernel) and not any(g.attribute(node, "output_padding", [0]))
        uniform = uniform and "output_shape" not in node.attributes
    if groups < 1 or outputs % groups or inputs % groups:
        return None
    axis = 1 - len(shape)
    return Linear(
        node, 0, 1, 2, groups, outputs, inputs, out_axis=axis, in_axis=axis, rank=len(shape), kernel=kernel,
        uniform=uniform,
    )  # fmt: skip


def padded(node: ir.Node, kernel: tuple[int, ...]) -> bool:
    """True when a Conv, ConvTranspose or pooling node may pad its input."""
    mode = g.attribute(node, "auto_pad", "NOTSET")
    if mode == "VALID":
        return False
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        return any(k != 1 for k in kernel)
    return any(g.attribute(node, "pads", [0]))


def _gemm(node: ir.Node) -> Linear | None:
    transposed = bool(g.attribute(node, "transA", 0)), bool(g.attribute(node, "transB", 0))
    weight = 1 if g.is_constant(node.inputs[1]) else 0
    shape = _constant_float(node.inputs[weight])
    if shape is None or len(shape) != 2 or g.is_constant(node.inputs[1 - weight]):
        return None
    # The weight is (in, out) as B, (out, in) as A, the other way round when transposed; the data likewise.
    out_last = (weight == 1) != transposed[weight]
    inputs, outputs = shape if out_last else shape[::-1]
    in_last = (weight == 1) != transposed[1 - weight]
    return Linear(
        node, 1 - weight, weight, 2, 1, outputs, inputs, out_axis=-1 if weight == 1 else -2,
        in_axis=-1 if in_last else -2, rank=2, out_last=out_last,
        gain=float(g.attribute(node, "alpha", 1.0)), bias_gain=float(g.attribute(node, "beta", 1.0)),
    )  # fmt: skip


def _matmul(node: ir.Node) -> Linear | None:
    weight = 1 if g.is_constant(node.inputs[1]) else 0
    shape = _constant_float(node.inputs[weight])
    if shape is None or len(shape) < 2 or g.is_constant(node.inputs[1 - weight]):
        return None
    data_shape = g.known_shape(node.inputs[1 - weight])
    if weight == 0 and (data_shape is None or len(data_shape) < 2):
        return None  # a vector on the right loses its axis
    if data_shape is None:
        rank = len(shape) - 1
    else:
        rank = max(len(data_shape), len(shape)) if len(data_shape) > 1 else len(shape) - 1
    inputs, outputs = shape[-2:] if weight == 1 else shape[:-3:-1]
    axis = -1 if weight == 1 else -2
    # The matrices of a stack would turn one constant per input channel into one per output channel and matrix.
    return Linear(
        node, 1 - weight, weight, None, 1, outputs, inputs, out_axis=axis, in_axis=axis, rank=rank, kernel=shape[:-2],
        out_last=weight == 1, uniform=len(shape) == 2,
    )  # fmt: skip


def inference_batchnorm(node: ir.Node) -> bool:
    """True for a BatchNormalization that uses its stored statistics, all constant, one per channel of axis 1."""
    return (
        g.is_op(node, "BatchNormalization")
        and not g.attribute(node, "training_mode", 0)
        and g.attribute(node, "spatial", 1) == 1
        and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
        and len(node.inputs) == 5
        and len({_constant_float(v) for v in node.inputs[1:]} - {None}) == 1
        and all(_constant_float(v) is not None for v in node.inputs[1:])
    )


def batchnorm_statistics(node: ir.Node, read: Read) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / sqrt(variance + epsilon) of an inference BatchNormalization, each (channels,) in float64."""
    mean, variance = node.inputs[3], node.inputs[4]
    assert mean is not None and variance is not None
    return read(mean), 1.0 / np.sqrt(read(variance) + float(g.attribute(node, "epsilon", 1e-5)))


def _batchnorm(node: ir.Node) -> Linear | None:
    shape = g.known_shape(node.inputs[0])
    if shape is None or len(shape) < 2 or g.is_constant(node.inputs[0]) or not inference_batchnorm(node):
        return None
    mean, gain = batchnorm_statistics(node, float64)
    if not np.all(np.isfinite(gain)):
        return None
    axis = 1 - len(shape)
    return Linear(
        node, 0, 1, 2, len(mean), len(mean), len(mean), out_axis=axis, in_axis=axis, rank=len(shape), gain=gain,
        shift=mean,
    )  # fmt: skip


def _normalization(node: ir.Node) -> Linear | None:
    shape, scale = g.known_shape(node.inputs[0]), _constant_float(node.inputs[1])
    if shape is None or scale is None or len(scale) != 1 or g.is_constant(node.inputs[0]):
        return None
    if node.op_type == "InstanceNormalization":
        axis = 1 - len(shape)
    else:
        axis = -1
        if g.attribute(node, "axis", -1) not in (-1, len(shape) - 1):
            return None
    if shape[axis] != scale[0]:
        return None
    bias = None if node.op_type == "RMSNormalization" else 2
    return Linear(
        node, 0, 1, bias, scale[0], scale[0], scale[0], out_axis=axis, in_axis=axis, rank=len(shape),
        uniform=False, linear_input=False,
    )  # fmt: skip


def float64(value: ir.Value) -> np.ndarray:
    """The content of a constant in float64."""
    array = g.constant(value)
    assert array is not None
    return array.astype(np.float64)


_VIEWS: dict[str, Callable[[ir.Node], Linear | None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batchnorm,
    "InstanceNormalization": _normalization,
    "LayerNormalization": _normalization,
    "RMSNormalization": _normalization,
}
