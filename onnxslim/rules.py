"""The rules of operators that compute, for `onnxslim.coupling`: what they tie, what they contract, what must change.

Those of operators that move data are in `onnxslim.rules_movement`, those that sum or pool along axes in
`onnxslim.rules_reductions`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from onnxslim.channels import Labels
from onnxslim.coupling import Axes, Coupling, Rule, Site, reason, unknown
from onnxslim.graph import attribute, constant, is_constant, is_op, opset, set_attribute

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators in ``names`` (separated by spaces)."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        return function

    return register


def optional(node: ir.Node, index: int) -> ir.Value | None:
    """Input ``index``, None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def data(node: ir.Node, index: int = 0) -> ir.Value:
    """Input ``index``, which the operator's specification requires."""
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} {node.name}: input {index} is absent"
    return value


def passed(c: Coupling, node: ir.Node, blocked: Iterable[int], why: str) -> Axes:
    """The axes of the first input, those in ``blocked`` frozen for ``why``."""
    axes = list(c.axes(data(node)))
    for axis in blocked:
        c.freeze(axes[axis], reason(node, why))
        axes[axis] = None
    return axes


@rule(
    "Relu LeakyRelu Sigmoid HardSigmoid HardSwish Tanh Elu Selu Celu Gelu Mish Softplus Softsign "
    "ThresholdedRelu Shrink Swish QuickGelu FastGelu BiasGelu Clip Abs Neg Sign Exp Log Sqrt Reciprocal Floor "
    "Ceil Round Erf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Identity Cast CastLike Dropout Not "
    "BitwiseNot IsNaN IsInf Add Sub Mul Div Pow Mod Min Max Mean Sum And Or Xor Equal Greater Less "
    "GreaterOrEqual LessOrEqual Where PRelu BitShift BitwiseAnd BitwiseOr BitwiseXor"
)
def elementwise(c: Coupling, node: ir.Node) -> None:
    """Axes aligned from the right are tied; an axis of size 1 is repeated and says nothing."""
    scalar_tail = {"Clip": 1, "Dropout": 1, "CastLike": 1}
    inputs = [v for v in node.inputs[: scalar_tail.get(node.op_type)] if v is not None]
    for output in node.outputs:
        if not output.name or output.name not in c.shapes:
            continue
        rank = len(c.shape(output))
        axes: Axes = []
        for axis in range(rank):
            size = c.shape(output)[axis]
            aligned = []
            for value in inputs:
                own = axis - rank + len(c.shape(value))
                if own >= 0 and size > 1 and c.shape(value)[own] == size:
                    aligned.append(c.axes(value)[own])
            labels = aligned[0] if aligned else None
            for other in aligned[1:]:
                labels = c.tie(labels, other, reason(node, "combined with a tensor that cannot be cut"))
            if labels is None:
                for other in aligned:
                    c.freeze(other, reason(node, "combined with a tensor that cannot be cut"))
            axes.append(labels)
        c.set(output, axes)


@rule("MatMul")
def matmul(c: Coupling, node: ir.Node) -> None:
    """The inner axes are contracted; every other axis of the result is one of an operand, or of both."""
    left, right = data(node, 0), data(node, 1)
    a, b = c.axes(left), c.axes(right)
    why = reason(node, "contracted with an axis that cannot be cut")
    inner = len(b) - 2 if len(b) > 1 else 0
    c.tie(a[-1], b[inner], why)
    if is_constant(left):
        c.contract(node, 1, inner, 0, len(a) - 1)
    else:
        c.contract(node, 0, len(a) - 1, 1, inner)
    rank = max(len(a), len(b))
    axes: Axes = []
    for axis in range(rank - 2):  # batch axes broadcast
        aligned = [
            (c.shape(v)[axis - rank + len(x)], x[axis - rank + len(x)])
            for v, x in ((left, a), (right, b))
            if axis - rank + len(x) >= 0 and len(x) > 2
        ]
        size = max(n for n, _ in aligned)
        full = [labels for n, labels in aligned if n == size]
        labels = full[0]
        for other in full[1:]:
            labels = c.tie(labels, other, reason(node, "combined with a tensor that cannot be cut"))
        axes.append(labels)
    if len(a) > 1:
        axes.append(a[-2])
    if len(b) > 1:
        axes.append(b[-1])
    c.set(node.outputs[0], axes)


@rule("Gemm")
def gemm(c: Coupling, node: ir.Node) -> None:
    """MatMul of matrices that may be transposed, with a bias along the columns of the result."""
    a, b = c.axes(data(node, 0)), c.axes(data(node, 1))
    ta, tb = attribute(node, "transA", 0), attribute(node, "transB", 0)
    c.tie(a[0 if ta else 1], b[1 if tb else 0], reason(node, "contracted with an axis that cannot be cut"))
    if is_constant(data(node, 0)):
        c.contract(node, 1, 1 if tb else 0, 0, 0 if ta else 1)
    else:
        c.contract(node, 0, 0 if ta else 1, 1, 1 if tb else 0)
    out: Axes = [a[1 if ta else 0], b[0 if tb else 1]]
    bias = optional(node, 2)
    if bias is not None:
        for axis, labels in zip((0, 1)[-len(c.axes(bias)) :] if c.axes(bias) else (), c.axes(bias), strict=True):
            if c.shape(bias)[axis - 2 + len(c.axes(bias))] > 1:
                out[axis] = c.tie(out[axis], labels, reason(node, "its bias cannot be cut"))
    c.set(node.outputs[0], out)


@rule("Einsum")
def einsum(c: Coupling, node: ir.Node) -> None:
    """Letters tie axes: one that the result lacks is contracted; at most two operands without an ellipsis."""
    equation = attribute(node, "equation").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    if not arrow or "." in equation or len(letters) > 2:
        unknown(c, node)
        return
    by_letter: dict[str, Labels | None] = {}
    for k, term in enumerate(letters):
        for axis, letter in enumerate(term):
            labels = c.axes(data(node, k))[axis]
            if c.shape(data(node, k))[axis] > 1 or letter not in by_letter:
                known = by_letter.get(letter, labels) if letter in by_letter else labels
                by_letter[letter] = (
                    c.tie(known, labels, reason(node, "shares a letter with an axis that cannot be cut"))
                    if letter in by_letter
                    else labels
                )
    for letter, labels in by_letter.items():
        if letter in result:
            continue
        inside = [k for k, term in enumerate(letters) if letter in term]
        if len(inside) < 2:  # summed in one tensor alone: no factor to refit
            c.freeze(labels, reason(node, "summed over"))
            continue
        weight = 0 if is_constant(data(node, 0)) else 1
        c.contract(node, 1 - weight, letters[1 - weight].index(letter), weight, letters[weight].index(letter))
    c.set(node.outputs[0], [by_letter[letter] for letter in result])


def _blocks(c: Coupling, x: Labels | None, groups: int, each: int, why: str) -> tuple[Labels | None, Labels | None]:
    """View an axis of groups * each as (groups, each): its channels leave by group or by position in every group."""
    if x is None:
        return None, None
    if groups == 1:
        return None, x
    if each == 1:
        return x, None
    outer, inner = c.ids.new(groups), c.ids.new(each)
    c.ids.define(x, [np.repeat(outer, each), np.tile(inner, groups)])
    return outer, inner


@rule("Conv ConvTranspose FusedConv")
def convolution(c: Coupling, node: ir.Node) -> None:
    """(N, C, ...) with a weight (out, C / groups, ...), or (C, out / groups, ...) when transposed."""
    x, weight = data(node, 0), data(node, 1)
    groups = attribute(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    axes = passed(c, node, range(2, len(c.shape(x))), "convolved over this axis")
    kernel = c.axes(weight)
    for labels in kernel[2:]:
        c.freeze(labels, reason(node, "an axis of the kernel"))
    why = reason(node, "convolves channels that cannot be cut")
    channels_in = c.shape(x)[1]
    channels_out = c.shape(weight)[1] * groups if transposed else c.shape(weight)[0]
    if transposed:
        out = c.ids.new(channels_out) if channels_out > 1 else None
        own_in, per_group = kernel[0], kernel[1]
    else:
        out = kernel[0]
        own_in, per_group = None, kernel[1]
    outer_in, inner_in = _blocks(c, axes[1], groups, channels_in // groups, why)
    outer_out, inner_out = _blocks(c, out, groups, channels_out // groups, why)
    if groups > 1:
        outer = c.tie(outer_in, outer_out, why)
        if outer is not None:
            c.edit(lambda kept: set_attribute(node, "group", int(kept(outer).sum())))
    if transposed:
        if channels_in > 1:
            c.tie(own_in, axes[1], why)
        if c.shape(weight)[1] > 1:
            c.tie(per_group, inner_out, why)
    elif c.shape(weight)[1] > 1:
        c.tie(per_group, inner_in, why)
    if channels_in // groups > 1:
        c.contract(node, 0, 1, 1, 0 if transposed else 1, groups)
    bias = optional(node, 2)
    if bias is not None and channels_out > 1:
        out = c.tie(out, c.axes(bias)[0], reason(node, "its bias cannot be cut"))
    extra = optional(node, 3)  # FusedConv adds a tensor to the result
    result: Axes = [axes[0], out] + [None] * (len(axes) - 2)
    if extra is not None:
        result[1] = c.tie(out, c.axes(extra)[1], why)
    c.set(node.outputs[0], result)


@rule("BatchNormalization")
def batch_normalization(c: Coupling, node: ir.Node) -> None:
    """Statistics, scale and bias have the channels of axis 1."""
    axes = list(c.axes(data(node)))
    for value in node.inputs[1:]:
        if value is not None and c.shape(value)[0] > 1:
            axes[1] = c.tie(axes[1], c.axes(value)[0], reason(node, "normalizes channels that cannot be cut"))
    c.set(node.outputs[0], axes)


@rule("InstanceNormalization")
def instance_normalization(c: Coupling, node: ir.Node) -> None:
    """Scale and bias have the channels of axis 1; axes behind it are averaged over and cannot be cut."""
    axes = passed(c, node, range(2, len(c.shape(data(node)))), "normalized over this axis")
    for value in node.inputs[1:]:
        if value is not None and c.shape(value)[0] > 1:
            axes[1] = c.tie(axes[1], c.axes(value)[0], reason(node, "normalizes channels that cannot be cut"))
    c.set(node.outputs[0], axes)


@rule("GroupNormalization")
def group_normalization(c: Coupling, node: ir.Node) -> None:
    """Statistics run over a group: channels leave by whole groups only."""
    axes = passed(c, node, range(2, len(c.shape(data(node)))), "normalized over this axis")
    groups, channels = attribute(node, "num_groups"), c.shape(data(node))[1]
    outer, inner = _blocks(c, axes[1], groups, channels // groups, "")
    c.freeze(inner, reason(node, "normalized over the channels of a group"))
    for value in node.inputs[1:]:
        if value is not None and c.shape(value)[0] > 1:
            own = axes[1] if c.shape(value)[0] == channels else outer
            c.tie(own, c.axes(value)[0], reason(node, "normalizes channels that cannot be cut"))
    if outer is not None:
        c.edit(lambda kept: set_attribute(node, "num_groups", int(kept(outer).sum())))
    c.set(node.outputs[0], axes)


@rule(
    "LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization "
    "SkipSimplifiedLayerNormalization"
)
def layer_normalization(c: Coupling, node: ir.Node) -> None:
    """Axes from ``axis`` on are averaged over: neither they nor scale and bias can be cut."""
    rank = len(c.shape(data(node)))
    first = attribute(node, "axis", -1) % rank
    why = "normalized over this axis"
    added = node.op_type.startswith("Skip")  # to what is normalized: the two keep their shape
    for value in node.inputs[0 if added else 1 :]:
        c.freeze_value(value, reason(node, why))
    axes = passed(c, node, range(first, rank), why)
    for output in node.outputs:
        if output.name in c.shapes:
            same = len(c.shape(output)) == rank
            c.set(output, axes if same else [None] * len(c.shape(output)))


@rule("Softmax LogSoftmax Hardmax CumSum LpNormalization")
def along_axis(c: Coupling, node: ir.Node) -> None:
    """What mixes the elements along one axis (or from it on, before opset 13) keeps that axis whole."""
    rank = len(c.shape(data(node)))
    if node.op_type == "CumSum":
        blocked = list(range(rank))
    elif node.op_type == "LpNormalization" or opset(c.model) >= 13:
        blocked = [attribute(node, "axis", -1) % rank]
    else:  # before opset 13 all axes from this one on are one
        blocked = list(range(attribute(node, "axis", 1) % rank, rank))
    c.set(node.outputs[0], passed(c, node, blocked, "normalized over this axis"))


@rule("QuantizeLinear DequantizeLinear")
def quantization(c: Coupling, node: ir.Node) -> None:
    """Scales and zero points per channel have the channels of ``axis``."""
    axes = list(c.axes(data(node)))
    axis = attribute(node, "axis", 1)
    for value in node.inputs[1:]:
        if value is None or not c.shape(value):
            continue
        own = c.axes(value)
        if len(own) == 1 and own[0] is not None:
            axis %= len(axes)
            axes[axis] = c.tie(axes[axis], own[0], reason(node, "quantizes channels that cannot be cut"))
        elif len(own) > 1:
            c.freeze_value(value, reason(node, "quantized by blocks"))
            c.freeze_value(data(node), reason(node, "quantized by blocks"))
            axes = [None] * len(axes)
    c.set(node.outputs[0], axes)


_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule("LSTM GRU RNN")
def recurrent(c: Coupling, node: ir.Node) -> None:
    """W (directions, gates * hidden, features) sums over the features, R (directions, gates * hidden, hidden) over the
    hidden units, which leave every gate and every direction at once.
    """
    x, w, r = data(node, 0), data(node, 1), data(node, 2)
    c.tie(c.axes(x)[2], c.axes(w)[2], reason(node, "contracted with an axis that cannot be cut"))
    c.contract(node, 0, 2, 1, 2)
    for axis in (0, 1):
        c.freeze(c.axes(x)[axis], reason(node, "a sequence or batch axis"))
    gates, hidden = _GATES[node.op_type], c.shape(r)[2]
    outputs = [v for v in node.outputs if v.name in c.shapes]
    # The batch-first layout of opset 14, and what is computed but never shown, have no rule.
    plain = attribute(node, "layout", 0) == 0 and node.outputs[0] in outputs and hidden > 1
    units = c.ids.new(hidden) if plain and is_constant(w) and is_constant(r) else None
    why = reason(node, "the hidden state of a recurrent layer")
    carriers = [(w, 1, gates), (r, 1, gates), (r, 2, 1), (optional(node, 3), 1, 2 * gates)]
    carriers += [(optional(node, 5), 2, 1), (optional(node, 6), 2, 1), (optional(node, 7), 1, 3)]
    for value, own, times in carriers:
        if value is None:
            continue
        for axis, labels in enumerate(c.axes(value)):
            if axis == own and units is not None:
                c.tie(np.tile(units, times), labels, why)
            elif (value is not w or axis != 2) and (value is not r or axis == 0 or units is None):
                c.freeze(labels, why)
    for output in outputs:
        c.set(output, [*[None] * (len(c.shape(output)) - 1), units])
    if units is not None:
        c.sites.append(Site(node, 0, 3, units, 2, 2, rank=4, source=node.outputs[0]))
        c.edit(functools.partial(_hidden_size, node, units))


def _hidden_size(node: ir.Node, units: Labels, kept: Callable[[Labels], np.ndarray]) -> None:
    set_attribute(node, "hidden_size", int(kept(units).sum()))


@rule("Shape Size")
def shape_of(c: Coupling, node: ir.Node) -> None:
    """The size of an axis that the graph reads at run time must stay: the reader may compute with it.

    Where it is read to give another tensor the same size, the two axes shrink together.
    """
    value, output = data(node), node.outputs[0]
    c.labels[output] = [None] * len(c.shape(output))
    axes = c.axes(value)
    rank = len(axes)
    if node.op_type == "Size":
        read = set(range(rank))
    else:
        start, end = attribute(node, "start", 0), attribute(node, "end", rank)
        read = _computed_with(c, node, output, [*range(rank)][start:end])
    for axis in read:
        c.freeze(axes[axis], reason(node, "its size is read at run time"))


# Per operator, the input that says how large its output is.
_SIZES = {"ConstantOfShape": 0, "Expand": 1, "Reshape": 1, "Resize": 3}


def _computed_with(c: Coupling, shape: ir.Node, value: ir.Value, places: list[int | None]) -> set[int]:
    """Axes whose sizes, read by ``shape``, are anything but sizes of another tensor.

    ``places`` says of every element of ``value`` of which axis it is the size, if of any. Where it is that of another
    tensor in the end, a target is recorded.
    """
    read: set[int | None] = set(places) if value.is_graph_output() else set()
    for use in value.uses():
        node, kind = use.node, use.node.op_type if use.node.domain in ("", "ai.onnx") else ""
        if node.graph is not shape.graph:
            read.update(places)
        elif _SIZES.get(kind) == use.idx:
            for entry, axis in enumerate(places):
                if axis is not None:
                    why = reason(shape, "its size is read at run time")
                    c.target(node, entry, c.axes(data(shape))[axis], why)
        elif kind == "Concat":
            before, after = (
                [None] * sum(c.shape(v)[0] for v in part if v is not None)
                for part in (node.inputs[: use.idx], node.inputs[use.idx + 1 :])
            )
            read |= _computed_with(c, shape, node.outputs[0], [*before, *places, *after])
        elif kind == "Cast":
            read |= _computed_with(c, shape, node.outputs[0], places)
        elif (picked := _entries(node, places) if use.idx == 0 else None) is not None:
            read |= _computed_with(c, shape, node.outputs[0], picked)
        else:
            read.update(places)
    return {axis for axis in read if axis is not None}


def _entries(node: ir.Node, places: list[int | None]) -> list[int | None] | None:
    """The entries of ``places`` that a Gather or Slice with constant arguments picks, None for other readers."""
    found = [constant(v) for v in node.inputs[1:]]
    arguments = [a.ravel().tolist() for a in found if a is not None]
    if len(arguments) < len(found):
        return None
    if is_op(node, "Gather"):
        return [places[k] for k in arguments[0]]
    if is_op(node, "Slice") and len(arguments) > 1:
        step = arguments[3][0] if len(arguments) > 3 else 1
        return places[python_slice(arguments[0][0], arguments[1][0], step)]
    return None


@rule("Trilu ReverseSequence")
def triangle(c: Coupling, node: ir.Node) -> None:
    """Works on two axes: the last two, or batch and time."""
    rank = len(c.shape(data(node)))
    blocked = (0, 1) if node.op_type == "ReverseSequence" else (rank - 2, rank - 1)
    c.set(node.outputs[0], passed(c, node, blocked, "works along this axis"))


@rule("Range RandomNormal RandomUniform EyeLike NonZero RandomNormalLike RandomUniformLike")
def generator(c: Coupling, node: ir.Node) -> None:
    """Made from a shape: what decides the shape cannot be cut, and the result has no channels of its own."""
    for value in node.inputs:
        c.freeze_value(value, reason(node, "its values decide a shape"))
    for output in node.outputs:
        c.labels[output] = [None] * len(c.shape(output))


def python_slice(start: int, end: int, step: int) -> slice:
    """A Python slice for ONNX's bounds, in which a very negative end means "past the beginning"."""
    return slice(start, None if step < 0 and end < -(1 << 30) else end, step)
