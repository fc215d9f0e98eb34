"""Affine quantization: parameters, weights and biases. Pure NumPy, no graph.

A real number x is stored as the integer q = clip(round(x / scale) + zero_point, qmin, qmax) and read back as
(q - zero_point) * scale. Rounding is to nearest, ties to even, as in the ONNX operator QuantizeLinear. Activations are
unsigned 8-bit with one scale per tensor; weights are signed 8-bit, symmetric (zero point 0), with one scale per output
channel; biases are 32-bit with scale ``scale_x * scale_w``, so that they add to the integer accumulator as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

# The scale of a bias is the product of two scales: it must not vanish in float32 (smallest normal number 1.2e-38).
SMALLEST_SCALE = 1e-18
# Room for the accumulator: a bias may use half of the int32 range.
LARGEST_BIAS = 2.0**30
# The largest stored weight: -128 stays unused, so that the range is symmetric.
LARGEST = 127
# Two neighbouring weights of one sign add up to this at most where their products with u8 are added in signed 16 bits.
LARGEST_PAIR = (2**15 - 1) // 255
# Numbers that are worked on at a time: what the caches of a processor hold.
BLOCK = 1 << 15
# Shares of the range of a weight that its steps may span; more than the range leaves room for large neighbours.
CLIPPED, WIDENED = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5), (1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2.0)


@dataclasses.dataclass(frozen=True)
class QParams:
    """Scale and zero point of one tensor; scalars, or vectors along ``axis``.

    Attributes:
        scale: float32, shape () or (channels,).
        zero_point: of the storage type, the shape of ``scale``.
        axis: axis of the channels; None when there is one scale for the whole tensor.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None

    @property
    def low(self) -> float:
        """The smallest real number that can be stored (one scale only)."""
        return float((np.iinfo(self.zero_point.dtype).min - self.zero_point.astype(np.float64)) * self.scale)

    @property
    def high(self) -> float:
        """The largest real number that can be stored (one scale only)."""
        return float((np.iinfo(self.zero_point.dtype).max - self.zero_point.astype(np.float64)) * self.scale)


def activation_params(low: float, high: float) -> QParams:
    """Unsigned 8-bit parameters that cover [low, high] and zero.

    Zero is always stored exactly: padding and Relu depend on it. When ``low`` is 0 the zero point is 0, so that storing
    a tensor also does the work of Relu.

    Raises:
        ValueError: an infinite or reversed range.
    """
    if not (np.isfinite(low) and np.isfinite(high)) or low > high:
        raise ValueError(f"not a range: [{low}, {high}]")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, SMALLEST_SCALE)
    zero_point = int(np.clip(round(-low / scale), 0, 255))
    return QParams(np.array(scale, np.float32), np.array(zero_point, np.uint8))


def quantize(array: np.ndarray, params: QParams) -> np.ndarray:
    """``array`` in the storage type of ``params``."""
    info = np.iinfo(params.zero_point.dtype)
    scale, zero = (_along(v, params.axis, array.ndim) for v in (params.scale, params.zero_point))
    steps = np.rint(array / scale.astype(np.float64)) + zero
    return np.clip(steps, info.min, info.max).astype(params.zero_point.dtype)


def dequantize(array: np.ndarray, params: QParams) -> np.ndarray:
    """The real numbers (float32) that a stored array stands for."""
    scale, zero = (_along(v, params.axis, array.ndim) for v in (params.scale, params.zero_point))
    return ((array.astype(np.float64) - zero) * scale).astype(np.float32)


def weight_params(
    weight: np.ndarray,
    axis: int,
    *,
    per_channel: bool = True,
    pairs: np.ndarray | None = None,
) -> QParams:
    """Signed symmetric parameters for ``weight`` with one scale per index of ``axis``, or one for all.

    Each scale minimizes the squared rounding error of its channel over a small set of factors of its range.

    Args:
        pairs: neighbours of each channel whose sum `within_pairs` will limit, (pairs, 2).
    """
    rows = _rows(weight, axis)
    peak = np.maximum(np.abs(rows).max(1, initial=0.0).astype(np.float64), SMALLEST_SCALE * LARGEST)
    if not per_channel:
        peak = np.full(len(peak), peak.max(initial=0.0))
    factors = CLIPPED if pairs is None else CLIPPED + WIDENED
    errors = np.empty((len(factors), len(rows)))
    height = max(BLOCK // max(rows.shape[1], 1), 1)
    for start in range(0, len(rows), height):  # all factors while a few rows are in the processor's cache
        part = slice(start, start + height)
        block = rows[part].astype(np.float64)
        for index, factor in enumerate(factors):
            trial = (peak[part] * factor / LARGEST)[:, None]
            steps = np.rint(block / trial)
            np.clip(steps, -LARGEST, LARGEST, out=steps)
            if pairs is not None:
                steps = within_pairs(steps, pairs)
            steps *= trial
            steps -= block
            errors[index, part] = np.square(steps, out=steps).sum(1)
    if not per_channel:
        peak, errors = peak[:1], errors.sum(1, keepdims=True)
    best = np.full(len(peak), np.inf)
    scale = peak / LARGEST
    for factor, error in zip(factors, errors, strict=True):
        # Clipping must pay: a tie keeps the whole range.
        better = error < best * (1 - 1e-9)
        best = np.where(better, error, best)
        scale = np.where(better, peak * factor / LARGEST, scale)
    if not per_channel:
        return QParams(np.array(scale[0], np.float32), np.array(0, np.int8))
    return QParams(scale.astype(np.float32), np.zeros(len(scale), np.int8), axis)


def widen_for_bias(weight: QParams, bias: np.ndarray, input_scale: float) -> QParams:
    """``weight`` with larger scales where the bias would not fit in 32 bits: channels whose weights are almost zero."""
    least = np.abs(bias.astype(np.float64)) / (input_scale * LARGEST_BIAS)
    if weight.axis is None:
        least = least.max(initial=0.0)
    # The largest stored weight shrinks with the scale's growth; such a channel is constant for all practical purposes.
    return dataclasses.replace(weight, scale=np.maximum(weight.scale, least).astype(np.float32))


def bias_params(weight: QParams, input_scale: np.ndarray, length: int) -> QParams:
    """32-bit parameters of a bias of ``length`` channels: scale ``input_scale * weight.scale``, zero point 0."""
    scale = np.float32(input_scale) * weight.scale
    if weight.axis is None:
        return QParams(np.asarray(scale, np.float32), np.array(0, np.int32))
    return QParams(np.broadcast_to(scale, (length,)).astype(np.float32), np.zeros(length, np.int32), 0)


def store_weight(weight: np.ndarray, axis: int, params: QParams, pairs: np.ndarray | None = None) -> np.ndarray:
    """``weight`` in int8, symmetric; ``pairs`` of each index of ``axis`` as `within_pairs` limits them."""
    stored = np.maximum(quantize(weight, params), -LARGEST)
    if pairs is None:
        return stored
    rows = within_pairs(_rows(stored, axis).astype(np.int32), pairs).astype(np.int8)
    return np.ascontiguousarray(np.moveaxis(rows.reshape(np.moveaxis(weight, axis, 0).shape), 0, axis))


def within_pairs(steps: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whole numbers ``steps`` (channels, K), both of a pair brought nearer to zero where their sum is too large.

    Args:
        pairs: columns (pairs, 2), each in one pair at most, whose products x86 CPUs without VNNI add in 16 bits.
    """
    total = steps[:, pairs[:, 0]] + steps[:, pairs[:, 1]]
    rows, found = np.nonzero(np.abs(total) > LARGEST_PAIR)
    if not len(rows):
        return steps
    total = total[rows, found]
    excess, sign = np.abs(total) - LARGEST_PAIR, np.sign(total)
    result = steps.copy()
    result[rows, pairs[found, 0]] -= sign * (excess - excess // 2)
    result[rows, pairs[found, 1]] -= sign * (excess // 2)
    return result


def may_saturate(stored: np.ndarray, pairs: np.ndarray) -> bool:
    """Whether two products of u8 with a pair of the int8 weights ``stored`` (channels, K) can leave signed 16 bits."""
    height = max(BLOCK // max(stored.shape[1], 1), 1)
    blocks = (stored[start : start + height].astype(np.int32) for start in range(0, len(stored), height))
    return any(np.abs(block[:, pairs].sum(2)).max(initial=0) > LARGEST_PAIR for block in blocks)


def _rows(array: np.ndarray, axis: int) -> np.ndarray:
    """``array`` as a matrix with one row per channel."""
    return np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def _along(vector: np.ndarray, axis: int | None, rank: int) -> np.ndarray:
    if axis is None or vector.ndim == 0:
        return vector
    shape: list[Any] = [1] * rank
    shape[axis] = -1
    return vector.reshape(shape)
