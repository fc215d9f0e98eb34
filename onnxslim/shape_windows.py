"""Rules of the operators that slide a window or resample: Conv, ConvTranspose, pools, Resize."""

from __future__ import annotations

import numpy as np

from onnxslim import symbolic
from onnxslim.shape_rules import NOTHING, Call, Fact, Shape, anything, axis_of, rule
from onnxslim.symbolic import Dim


def _window(call: Call, sizes: Shape, kernel: Shape, ceil: bool) -> list[Dim]:
    """Sizes that a sliding window leaves; ``kernel`` are the undilated sizes of the window.

    A size that is no number is taken to hold one window at least.
    """
    rank = len(sizes)
    strides = call.attr("strides") or [1] * rank
    dilations = call.attr("dilations") or [1] * rank
    pads = call.attr("pads") or [0] * (2 * rank)
    auto = str(call.attr("auto_pad", "NOTSET"))
    result: list[Dim] = []
    for k, size in enumerate(sizes):
        stride = strides[k]
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            # Runtimes differ on whether the padding of a pool is that of the dilated window.
            known = dilations[k] == 1 or "Pool" not in call.node.op_type
            result.append(symbolic.floor_divide(size + (stride - 1), stride) if known else symbolic.unknown(0))
            continue
        padded = size if auto == "VALID" else size + pads[k] + pads[k + rank]
        free = padded - (dilations[k] * (kernel[k] - 1) + 1)
        if ceil and stride > 1 and symbolic.quotient([free], [stride]) is None:
            result.append(symbolic.unknown(0))  # the last window may or may not start inside: runtimes differ
            continue
        divide = symbolic.truncate_divide if isinstance(free, int) else symbolic.floor_divide
        result.append(divide(free, stride) + 1)
    return result


def _convolved(call: Call, x: Shape | None, w: Shape | None) -> list[Fact]:
    if x is None or w is None or len(x) < 2 or len(w) != len(x):
        return [NOTHING if x is None else Fact(anything(len(x)))]
    return [Fact((x[0], w[0], *_window(call, x[2:], w[2:], False)))]


@rule("Conv", "ConvInteger")
def conv(call: Call) -> list[Fact]:
    """(n, filters, spatial)."""
    return _convolved(call, call.shape(0), call.shape(1))


@rule("QLinearConv")
def qlinear_conv(call: Call) -> list[Fact]:
    """(n, filters, spatial) of the inputs 0 and 3."""
    return _convolved(call, call.shape(0), call.shape(3))


@rule("ConvTranspose")
def conv_transpose(call: Call) -> list[Fact]:
    """stride * (size - 1) + output_padding + dilated kernel - pads, which are not negative where they are not given."""
    x, w = call.shape(0), call.shape(1)
    if x is None or w is None or len(x) < 2 or len(w) != len(x):
        return [NOTHING if x is None else Fact(anything(len(x)))]
    rank = len(x) - 2
    channels = w[1] * call.attr("group", 1)
    given = call.attr("output_shape")
    if given:
        return [Fact((x[0], channels, *given[-rank:]))]
    strides = call.attr("strides") or [1] * rank
    dilations = call.attr("dilations") or [1] * rank
    pads = call.attr("pads") or [0] * (2 * rank)
    extra = call.attr("output_padding") or [0] * rank
    auto = str(call.attr("auto_pad", "NOTSET"))
    sizes: list[Dim] = []
    for k, size in enumerate(x[2:]):
        whole = (size - 1) * strides[k] + extra[k] + (dilations[k] * (w[2 + k] - 1) + 1)
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            sizes.append(symbolic.minimum(size * strides[k], whole))
            continue
        sizes.append(whole - (0 if auto == "VALID" else pads[k] + pads[k + rank]))
    return [Fact((x[0], channels, *sizes))]


@rule("MaxPool", "AveragePool", "LpPool")
def pool(call: Call) -> list[Fact]:
    """(n, c, spatial); the indices of MaxPool have the same shape."""
    x, kernel = call.shape(), call.attr("kernel_shape")
    if x is None or kernel is None or len(kernel) != len(x) - 2:
        return [NOTHING if x is None else Fact(anything(len(x)))]
    fact = Fact((*x[:2], *_window(call, x[2:], tuple(kernel), bool(call.attr("ceil_mode", 0)))))
    return [fact, fact]


@rule("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
def global_pool(call: Call) -> list[Fact]:
    """(n, c, 1, ...)."""
    x = call.shape()
    return [NOTHING if x is None else Fact((*x[:2], *[1] * (len(x) - 2)))]


@rule("Resize", "Upsample")
def resize(call: Call) -> list[Fact]:
    """The given sizes, or floor(size * scale)."""
    shape = call.shape()
    if shape is None:
        return [NOTHING]
    cropped = call.attr("coordinate_transformation_mode") == "tf_crop_and_resize"
    if cropped or call.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        return [Fact(anything(len(shape)))]
    axes = [axis_of(a, len(shape)) for a in call.attr("axes") or range(len(shape))]
    result = list(shape)
    if call.node.op_type == "Resize" and call.has(3):
        sizes = call.dims(3)
        if sizes is None or len(sizes) != len(axes):
            return [Fact(anything(len(shape)))]
        for axis, size in zip(axes, sizes, strict=True):
            result[axis] = size if symbolic.nonnegative(size) else symbolic.unknown(0)
        return [Fact(tuple(result))]
    scales = resize_scales(call)
    if scales is None or len(scales) != len(axes):
        return [Fact(anything(len(shape)))]
    for axis, scale in zip(axes, scales, strict=True):
        result[axis] = _scaled(shape[axis], scale)
    return [Fact(tuple(result))]


def resize_scales(call: Call) -> list[float] | None:
    """The scales of Resize or Upsample, when they are constant and used."""
    if call.attr("scales") is not None:
        return list(call.attr("scales"))
    index = 1 if call.node.op_type == "Upsample" or call.opset < 11 else 2
    value = call.node.inputs[index] if index < len(call.node.inputs) else None
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return [float(s) for s in value.const_value.numpy().reshape(-1)] or None


def _scaled(size: Dim, scale: float) -> Dim:
    if isinstance(size, int):
        return int(np.floor(np.float32(size) * np.float32(scale)))
    if scale == int(scale):
        return size * int(scale)
    if (1 / scale).is_integer() and np.float32(scale) == scale and np.log2(scale).is_integer():
        return symbolic.floor_divide(size, int(1 / scale))
    return symbolic.unknown(0)
