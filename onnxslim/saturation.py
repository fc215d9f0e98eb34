"""Sums that do not fit where x86 CPUs without VNNI keep them.

Their kernels for u8 x s8 multiply two neighbouring inputs with their weights and add the two products in a signed
16-bit number, which saturates. Neighbours are input channels at one place of the window of a Conv, and rows of the
weight of a Gemm or MatMul. Convolutions with one filter per channel have kernels of their own, which add in 32 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from onnxslim import runtime
from onnxslim.calibration import Statistic, collect
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import attribute
from onnxslim.quantization import QParams, may_saturate, quantize
from onnxslim.rounding import Gram
from onnxslim.units import Unit

LIMIT = np.iinfo(np.int16).max
# Samples that are simulated, and rows of each.
SAMPLES, ROWS = 8, 64
# Sums that are made for all outputs at once, the largest first.
CHUNK = 256


@functools.cache
def saturates_here() -> bool:
    """Whether the integer kernels of the CPU of this machine saturate, as one product of large numbers shows."""
    left = ir.Value(name="x", type=ir.TensorType(ir.DataType.UINT8), shape=ir.Shape([16, 64]))
    stored = ir.tensor(np.full((64, 16), 127, np.int8), name="w")
    right = ir.Value(name="w", const_value=stored, type=ir.TensorType(stored.dtype), shape=ir.Shape([64, 16]))
    node = ir.node("MatMulInteger", [left, right])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph([left], node.outputs, nodes=[node], initializers=[right], opset_imports={"": 17}, name="probe")
    runner = runtime.load(ir.Model(graph, ir_version=8), threads=1)
    product = runner({"x": np.full((16, 64), 255, np.uint8)})["y"]
    return bool((product != 64 * 255 * 127).any())


class Pairs:
    """Whether a sum of two neighbouring products leaves 16 bits for the inputs seen.

    Args:
        params: how the input is stored (u8).
        stored: int8 weight; ``axis`` is that of its output channels.
    """

    def __init__(self, unit: Unit, params: QParams, stored: np.ndarray, axis: int) -> None:
        self.gram = Gram(unit, stored.shape, ROWS)
        self.params = params
        weight = np.moveaxis(stored, axis, 0).reshape(self.gram.groups, stored.shape[axis] // self.gram.groups, -1)
        self.order = neighbours(unit.node, stored.shape, axis).reshape(-1)
        self.first, self.second = weight[..., self.order[0::2]], weight[..., self.order[1::2]]
        both = self.first.astype(np.int16) + self.second
        parts = (self.first, self.second, both)
        # Over the outputs, (groups, 1, pairs) each: of the first, the second, and their sum.
        self._most = [part.max(1, keepdims=True).astype(np.int32) for part in parts]
        self._least = [part.min(1, keepdims=True).astype(np.int32) for part in parts]
        self.overflow = False

    def update(self, array: np.ndarray) -> None:
        if self.overflow:
            return
        rows = self.gram.some(array)[..., self.order]
        if not rows.shape[1]:
            return
        codes = quantize(rows, self.params).astype(np.int32)
        first, second = codes[..., 0::2], codes[..., 1::2]
        # a v + b w is min(a, b) (v + w) and what the larger one has beyond: no output can have more than the largest of
        # both, and the products need to be made only where that is too much.
        common = np.minimum(first, second)
        most, least = (
            common * both + (first - common) * v + (second - common) * w for v, w, both in (self._most, self._least)
        )
        reach = np.maximum(most, -least)
        suspects = np.argwhere(reach > LIMIT)
        suspects = suspects[np.argsort(-reach[tuple(suspects.T)], kind="stable")]
        for start in range(0, len(suspects), CHUNK):
            group, row, pair = suspects[start : start + CHUNK].T
            sums = first[group, row, pair, None] * self.first[group, :, pair].astype(np.int32)
            sums += second[group, row, pair, None] * self.second[group, :, pair].astype(np.int32)
            if np.abs(sums).max(initial=0) > LIMIT:
                self.overflow = True
                return


def neighbours(node: ir.Node, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Which two inputs of an output of ``node`` kernels multiply and add together: (pairs, 2).

    They count the inputs as the weight, of ``shape`` with outputs along ``axis``, does when its outputs come first; the
    kernels order them by place, the channels of one after the other.
    """
    width = int(np.prod(shape)) // shape[axis]
    channels = shape[1] if node.op_type == "Conv" else width
    if channels == 1 and int(attribute(node, "group", 1)) == shape[0] > 1:  # one filter per channel: depthwise
        return np.zeros((0, 2), np.int64)
    order = np.arange(width).reshape(channels, width // channels).T.reshape(-1)
    return order[: len(order) // 2 * 2].reshape(-1, 2)


def overflowing(
    model: ir.Model,
    units: Mapping[str, Unit],
    weights: Mapping[str, tuple[np.ndarray, QParams]],
    params: Mapping[str, QParams],
    ctx: Context,
    data: Data,
) -> list[str]:
    """Names of the products of ``units`` of which a sum of two products leaves 16 bits on some sample.

    Args:
        weights: stored weights; params: of the input of each product, by the name of the product.
    """
    pairs: dict[str, Pairs] = {}
    for name, unit in units.items():
        assert unit.weight is not None
        stored, axis = weights[name][0], unit.weight[1]
        columns = np.moveaxis(stored, axis, 0).reshape(stored.shape[axis], -1)
        if may_saturate(columns, neighbours(unit.node, stored.shape, axis)):
            pairs[name] = Pairs(unit, params[name], stored, axis)
    attached: dict[str, list[Statistic]] = {}
    for name, pair in pairs.items():
        attached.setdefault(units[name].inputs[0], []).append(pair)
    if attached:
        collect(model, attached, ctx, data=data.spread(SAMPLES), label="saturation")
    return [name for name, pair in pairs.items() if pair.overflow]
