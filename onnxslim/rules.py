"""The rule of every operator for `onnxslim.coupling`: what it ties, what it contracts, what must change with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np
import onnx_ir as ir

from onnxslim import movement
from onnxslim.channels import Labels
from onnxslim.coupling import Axes, Coupling, Rule, reason, unknown
from onnxslim.graph import add_constant, add_node, attribute, constant, is_constant, is_op, opset, set_attribute
from onnxslim.movement import Axis

RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for the operators in ``names`` (separated by spaces)."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = function
        return function

    return register


def _in(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _data(node: ir.Node, index: int = 0) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} {node.name}: input {index} is absent"
    return value


def _passed(c: Coupling, node: ir.Node, blocked: Iterable[int], why: str) -> Axes:
    """The axes of the first input, those in ``blocked`` frozen for ``why``."""
    axes = list(c.axes(_data(node)))
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
    left, right = _data(node, 0), _data(node, 1)
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
    a, b = c.axes(_data(node, 0)), c.axes(_data(node, 1))
    ta, tb = attribute(node, "transA", 0), attribute(node, "transB", 0)
    c.tie(a[0 if ta else 1], b[1 if tb else 0], reason(node, "contracted with an axis that cannot be cut"))
    if is_constant(_data(node, 0)):
        c.contract(node, 1, 1 if tb else 0, 0, 0 if ta else 1)
    else:
        c.contract(node, 0, 0 if ta else 1, 1, 1 if tb else 0)
    out: Axes = [a[1 if ta else 0], b[0 if tb else 1]]
    bias = _in(node, 2)
    if bias is not None:
        for axis, labels in zip((0, 1)[-len(c.axes(bias)) :] if c.axes(bias) else (), c.axes(bias), strict=True):
            if c.shape(bias)[axis - 2 + len(c.axes(bias))] > 1:
                out[axis] = c.tie(out[axis], labels, reason(node, "its bias cannot be cut"))
    c.set(node.outputs[0], out)


@rule("Einsum")
def einsum(c: Coupling, node: ir.Node) -> None:
    equation = attribute(node, "equation").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")
    if not arrow or "." in equation or len(letters) > 2:
        unknown(c, node)
        return
    by_letter: dict[str, Labels | None] = {}
    for k, term in enumerate(letters):
        for axis, letter in enumerate(term):
            labels = c.axes(_data(node, k))[axis]
            if c.shape(_data(node, k))[axis] > 1 or letter not in by_letter:
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
        weight = 0 if is_constant(_data(node, 0)) else 1
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
    x, weight = _data(node, 0), _data(node, 1)
    groups = attribute(node, "group", 1)
    transposed = node.op_type == "ConvTranspose"
    axes = _passed(c, node, range(2, len(c.shape(x))), "convolved over this axis")
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
    bias = _in(node, 2)
    if bias is not None and channels_out > 1:
        out = c.tie(out, c.axes(bias)[0], reason(node, "its bias cannot be cut"))
    extra = _in(node, 3)  # FusedConv adds a tensor to the result
    result: Axes = [axes[0], out] + [None] * (len(axes) - 2)
    if extra is not None:
        result[1] = c.tie(out, c.axes(extra)[1], why)
    c.set(node.outputs[0], result)


@rule("BatchNormalization")
def batch_normalization(c: Coupling, node: ir.Node) -> None:
    axes = list(c.axes(_data(node)))
    for value in node.inputs[1:]:
        if value is not None and c.shape(value)[0] > 1:
            axes[1] = c.tie(axes[1], c.axes(value)[0], reason(node, "normalizes channels that cannot be cut"))
    c.set(node.outputs[0], axes)


@rule("InstanceNormalization")
def instance_normalization(c: Coupling, node: ir.Node) -> None:
    axes = _passed(c, node, range(2, len(c.shape(_data(node)))), "normalized over this axis")
    for value in node.inputs[1:]:
        if value is not None and c.shape(value)[0] > 1:
            axes[1] = c.tie(axes[1], c.axes(value)[0], reason(node, "normalizes channels that cannot be cut"))
    c.set(node.outputs[0], axes)


@rule("GroupNormalization")
def group_normalization(c: Coupling, node: ir.Node) -> None:
    """Statistics run over a group: channels leave by whole groups only."""
    axes = _passed(c, node, range(2, len(c.shape(_data(node)))), "normalized over this axis")
    groups, channels = attribute(node, "num_groups"), c.shape(_data(node))[1]
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
    rank = len(c.shape(_data(node)))
    first = attribute(node, "axis", -1) % rank
    why = "normalized over this axis"
    axes = _passed(c, node, range(first, rank), why)
    for value in node.inputs[1:]:
        c.freeze_value(value, reason(node, why))
    for output in node.outputs:
        if output.name in c.shapes:
            same = len(c.shape(output)) == rank
            c.set(output, axes if same else [None] * len(c.shape(output)))


@rule("Softmax LogSoftmax Hardmax CumSum LpNormalization")
def along_axis(c: Coupling, node: ir.Node) -> None:
    rank = len(c.shape(_data(node)))
    if node.op_type == "CumSum":
        blocked = list(range(rank))
    elif node.op_type == "LpNormalization" or opset(c.model) >= 13:
        blocked = [attribute(node, "axis", -1) % rank]
    else:  # before opset 13 all axes from this one on are one
        blocked = list(range(attribute(node, "axis", 1) % rank, rank))
    c.set(node.outputs[0], _passed(c, node, blocked, "normalized over this axis"))


@rule(
    "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool LRN Resize Upsample ReduceMean "
    "ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare "
    "ArgMax ArgMin TopK"
)
def reduction(c: Coupling, node: ir.Node) -> None:
    """Axes that are reduced, pooled or resized stay; the others pass."""
    shape = c.shape(_data(node))
    rank = len(shape)
    kind = node.op_type
    if kind in ("TopK", "ArgMax", "ArgMin"):
        changed = {attribute(node, "axis", -1 if kind == "TopK" else 0) % rank}
    elif kind.startswith("Reduce"):
        chosen = attribute(node, "axes")
        if chosen is None:
            found = c.argument(_in(node, 1))
            chosen = [] if found is None else found.ravel().tolist()
        if not chosen and not attribute(node, "noop_with_empty_axes", 0):
            chosen = range(rank)
        changed = {a % rank for a in chosen}
    elif kind == "LRN":
        changed = {1}
    elif kind in ("Resize", "Upsample"):
        resized = c.shape(node.outputs[0])
        changed = {a for a in range(rank) if shape[a] != resized[a] or a >= 2}
    else:
        changed = set(range(2, rank))
    why = "normalized over its neighbours" if kind == "LRN" else "reduced, pooled or resized along this axis"
    axes = _passed(c, node, sorted(changed), why)
    keep = attribute(node, "keepdims", 1)
    removes = not keep and kind.startswith(("Reduce", "Arg"))
    for output in node.outputs:
        if output.name in c.shapes:
            c.set(output, [x for a, x in enumerate(axes) if not (removes and a in changed)])
    sizes = _in(node, 3) if kind == "Resize" else None
    if sizes is not None:
        order = attribute(node, "axes", list(range(rank)))
        _sizes_argument(c, node, 3, {k: axes[a] for k, a in enumerate(order)})


@rule("QuantizeLinear DequantizeLinear")
def quantization(c: Coupling, node: ir.Node) -> None:
    axes = list(c.axes(_data(node)))
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
            c.freeze_value(_data(node), reason(node, "quantized by blocks"))
            axes = [None] * len(axes)
    c.set(node.outputs[0], axes)


@rule("LSTM GRU RNN")
def recurrent(c: Coupling, node: ir.Node) -> None:
    """The input features are contracted with W (directions, gates * hidden, features); the hidden state stays."""
    why = reason(node, "the hidden state of a recurrent layer")
    x, w = _data(node, 0), _data(node, 1)
    c.tie(c.axes(x)[2], c.axes(w)[2], reason(node, "contracted with an axis that cannot be cut"))
    c.contract(node, 0, 2, 1, 2)
    for axis in (0, 1):
        c.freeze(c.axes(w)[axis], why)
        c.freeze(c.axes(x)[axis], reason(node, "a sequence or batch axis"))
    for value in node.inputs[2:]:
        c.freeze_value(value, why)
    for output in node.outputs:
        if output.name in c.shapes:
            c.set(output, [None] * len(c.shape(output)))


@rule("Shape Size")
def shape_of(c: Coupling, node: ir.Node) -> None:
    """The size of an axis that the graph reads at run time must stay: the reader may compute with it."""
    value, output = _data(node), node.outputs[0]
    c.labels[output] = [None] * len(c.shape(output))
    axes = c.axes(value)
    rank = len(axes)
    if node.op_type == "Size":
        read = set(range(rank))
    else:
        start, end = attribute(node, "start", 0), attribute(node, "end", rank)
        span = list(range(rank))[start:end]
        read = set()
        for use in output.uses():
            indices = constant(_in(use.node, 1)) if is_op(use.node, "Gather") and use.idx == 0 else None
            if indices is None or use.node.graph is not node.graph:
                read.update(span)
            else:
                read.update(span[int(k)] for k in indices.ravel())
        if output.is_graph_output():
            read.update(span)
    for axis in read:
        c.freeze(axes[axis], reason(node, "its size is read at run time"))


@rule("Trilu ReverseSequence")
def triangle(c: Coupling, node: ir.Node) -> None:
    """Works on two axes: the last two, or batch and time."""
    rank = len(c.shape(_data(node)))
    blocked = (0, 1) if node.op_type == "ReverseSequence" else (rank - 2, rank - 1)
    c.set(node.outputs[0], _passed(c, node, blocked, "works along this axis"))


@rule("ConstantOfShape Range RandomNormal RandomUniform EyeLike NonZero RandomNormalLike RandomUniformLike")
def generator(c: Coupling, node: ir.Node) -> None:
    for value in node.inputs:
        c.freeze_value(value, reason(node, "its values decide a shape"))
    for output in node.outputs:
        c.labels[output] = [None] * len(c.shape(output))


@rule("Reshape Flatten Squeeze Unsqueeze Transpose Concat Split Slice Gather Expand Tile Pad DepthToSpace SpaceToDepth")
def data_movement(c: Coupling, node: ir.Node) -> None:
    """Ask `onnxslim.movement` which slices of the outputs the slices of the inputs become; say the same of the ids."""
    count = len(node.inputs) if node.op_type == "Concat" else 1
    data = [_data(node, k) for k in range(count)]
    shapes = [c.shape(v) for v in data]
    arguments = [c.argument(v) for v in node.inputs[count:]]
    unseen = [v for v, a in zip(node.inputs[count:], arguments, strict=True) if v is not None and a is None]
    axes = {Axis(k, a): x for k, v in enumerate(data) for a, x in enumerate(c.axes(v))}
    if all(x is None for x in axes.values()) and not unseen:
        for output in node.outputs:
            c.labels[output] = [None] * len(c.shape(output))
        return
    if unseen and not (node.op_type == "Pad" and unseen == [_in(node, 2)]):
        unknown(c, node)
        return
    if node.op_type == "Concat":  # a part that cannot be cut does not hold back the others
        axis = attribute(node, "axis") % len(shapes[0])
        if any(axes[Axis(k, axis)] is not None for k in range(count)):
            for k in range(count):
                if axes[Axis(k, axis)] is None and shapes[k][axis] > 1:
                    axes[Axis(k, axis)] = c.ids.new(shapes[k][axis])
                    c.freeze(axes[Axis(k, axis)], reason(node, "joined from a tensor that cannot be cut"))
    for blocked in _run_time_axes(c, node, len(shapes[0])):
        c.freeze(axes[Axis(0, blocked)], reason(node, "indexed by values that are computed at run time"))
        axes[Axis(0, blocked)] = None
    fixed = {axis for axis, x in axes.items() if x is None}
    for output, indices in zip(node.outputs, movement.copies(node, shapes, arguments, opset(c.model)), strict=True):
        found, uncut, stuck = movement.blocks(indices, shapes, fixed)
        for axis, used in stuck.items():
            labels = axes[axis]
            assert labels is not None
            c.freeze(labels[used], reason(node, "its parts are mixed with an axis that cannot be cut"))
        out: Axes = [None] * indices.ndim
        for block in found:
            for axis_out, labels in _label(c, node, block, axes, indices.shape).items():
                out[axis_out] = labels
        linked = {b for block in found for b in block.outputs} | uncut
        if node.op_type == "Expand":  # axes along which one slice is repeated: copies can leave
            for b in range(indices.ndim):
                if b not in linked and indices.shape[b] > 1 and not _varies_outside(c, node, b, indices.ndim):
                    out[b] = c.ids.new(indices.shape[b])
        c.set(output, out)
    _rewrite(c, node, axes)


def _varies_outside(c: Coupling, node: ir.Node, axis: int, rank: int) -> bool:
    """True when the size of an output axis is that of an input axis, which can be symbolic."""
    shape = c.shape(_data(node))
    own = axis - rank + len(shape)
    return own >= 0 and shape[own] != 1


def _run_time_axes(c: Coupling, node: ir.Node, rank: int) -> list[int]:
    """Input axes whose indexing is computed at run time, so that another sample could index them otherwise."""
    if node.op_type == "Gather" and not is_constant(_in(node, 1)):
        return [attribute(node, "axis", 0) % rank]
    if node.op_type == "Slice" and "starts" in node.attributes:  # before opset 10: not rewritten
        return [a % rank for a in attribute(node, "axes", list(range(len(attribute(node, "starts")))))]
    if node.op_type == "Slice" and any(v is not None and not is_constant(v) for v in node.inputs[1:]):
        chosen = c.argument(_in(node, 3))
        fixed = is_constant(_in(node, 3)) and chosen is not None
        return [int(a) % rank for a in chosen.ravel()] if fixed and chosen is not None else list(range(rank))
    if node.op_type == "Split" and _in(node, 1) is not None and not is_constant(_in(node, 1)):
        return [attribute(node, "axis", 0) % rank]
    if node.op_type in ("Tile", "Pad") and not is_constant(_in(node, 1)) and "pads" not in node.attributes:
        return list(range(rank))
    return []


def _label(
    c: Coupling, node: ir.Node, block: movement.Block, axes: dict[Axis, Labels | None], shape: tuple[int, ...]
) -> dict[int, Labels]:
    """Labels for the output axes of a block, and the statements that bind them to the inputs'."""
    single = len(block.outputs) == 1 and all(
        sum(a.tensor == tensor for a in block.sources) == 1 for tensor in block.rows
    )
    out = {b: c.ids.new(shape[b]) for b in block.outputs}
    seen = {b: np.zeros(shape[b], bool) for b in block.outputs}
    for tensor, rows in block.rows.items():
        sources = [a for a in block.sources if a.tensor == tensor]
        left = [_ids(axes, a)[rows[:, k]] for k, a in enumerate(sources)]
        right = [out[b][rows[:, len(sources) + k]] for k, b in enumerate(block.outputs)]
        for k, b in enumerate(block.outputs):
            seen[b][rows[:, len(sources) + k]] = True
        if single:
            c.ids.tie(left[0], right[0])
        elif len(left) == 1:
            c.ids.define(left[0], right)
        elif len(right) == 1:
            c.ids.define(right[0], left)
        else:
            both = c.ids.new(len(rows))
            c.ids.define(both, left)
            c.ids.define(both, right)
    for b, present in seen.items():
        c.freeze(out[b][~present], reason(node, "filled with a constant, or of a tensor that cannot be cut"))
    return out


def _ids(axes: dict[Axis, Labels | None], axis: Axis) -> Labels:
    labels = axes[axis]
    assert labels is not None
    return labels


def _rewrite(c: Coupling, node: ir.Node, axes: dict[Axis, Labels | None]) -> None:
    """Register the change of the constants that say how large the pieces are, or freeze what cannot be changed."""
    if node.op_type in ("Reshape", "Expand"):
        output = c.axes(node.outputs[0])
        target = c.argument(_in(node, 1))
        shift = 0 if target is None else len(output) - target.size  # Expand aligns from the right
        _sizes_argument(c, node, 1, {a - shift: x for a, x in enumerate(output) if a >= shift})
    elif node.op_type == "Split":
        axis = attribute(node, "axis", 0) % len(c.shape(_data(node)))
        parts = [c.axes(v)[axis] for v in node.outputs]
        sizes = [c.shape(v)[axis] for v in node.outputs]
        if any(x is not None for x in parts):
            c.edit(functools.partial(_split, c, node, parts, sizes))
    elif node.op_type == "Gather":
        labels = axes[Axis(0, attribute(node, "axis", 0) % len(axes))]
        if labels is not None:
            c.edit(functools.partial(_gather, c, node, labels))
    elif node.op_type == "Slice":
        for axis in range(len(axes)):
            labels = axes[Axis(0, axis)]
            if labels is not None and is_constant(_in(node, 1)):
                c.edit(functools.partial(_slice, c, node, axis, labels))


def _sizes_argument(c: Coupling, node: ir.Node, index: int, entries: dict[int, Labels | None]) -> None:
    """Entry k of the sizes in input ``index`` is the size of an axis with these labels: keep it true, or freeze."""
    value = _in(node, index)
    if value is None:
        return
    sizes = constant(value)
    if sizes is not None:
        c.labels.setdefault(value, [None] * sizes.ndim)

        def change(kept: Callable[[Labels], np.ndarray]) -> None:
            new = sizes.copy()
            for k, labels in entries.items():
                if labels is not None and sizes[k] == len(labels):  # not 0, -1, or the 1 of an Expand
                    new[k] = kept(labels).sum()
            if (new != sizes).any():
                node.replace_input_with(index, add_constant(c.model.graph, f"{value.name}_cut", new))

        c.edit(change)
        return
    pieces = _pieces(c, value)
    for k, labels in entries.items():
        if labels is None:
            continue
        producer, piece = pieces.get(k, (None, None)) if pieces else (None, None)
        if producer is None or piece is None:
            c.freeze(labels, reason(node, "its size is computed at run time"))
            continue
        c.edit(functools.partial(_piece, c, node, index, k, labels, piece))


def _pieces(c: Coupling, value: ir.Value) -> dict[int, tuple[ir.Node, int]]:
    """For sizes joined by a Concat of single entries: entry -> (the Concat, its input) where that input is constant."""
    producer = value.producer()
    if producer is None or not is_op(producer, "Concat"):
        return {}
    result: dict[int, tuple[ir.Node, int]] = {}
    start = 0
    for k, part in enumerate(producer.inputs):
        assert part is not None
        size = c.shape(part)[0]
        if size == 1 and is_constant(part):
            result[start] = (producer, k)
        start += size
    return result


def _piece(
    c: Coupling, node: ir.Node, index: int, entry: int, labels: Labels, piece: int, kept: Callable[[Labels], np.ndarray]
) -> None:
    value = node.inputs[index]
    if kept(labels).all() or value is None:
        return
    concat = value.producer()
    assert concat is not None
    if len(value.uses()) > 1:  # other readers keep the old sizes
        copy = ir.node("Concat", list(concat.inputs), {"axis": 0}, name=f"{concat.name}_cut_{node.name}")
        copy.outputs[0].name = f"{value.name}_cut_{node.outputs[0].name}"
        assert isinstance(node.graph, ir.Graph)
        node.graph.insert_before(node, copy)
        node.replace_input_with(index, copy.outputs[0])
        concat = copy
    old = constant(concat.inputs[piece])
    assert old is not None
    if old[0] == len(labels):
        new = np.array([kept(labels).sum()], old.dtype)
        concat.replace_input_with(piece, add_constant(c.model.graph, f"{value.name}_{entry}", new))


def _split(
    c: Coupling,
    node: ir.Node,
    parts: list[Labels | None],
    sizes: list[int],
    kept: Callable[[Labels], np.ndarray],
) -> None:
    new = [n if x is None else int(kept(x).sum()) for x, n in zip(parts, sizes, strict=True)]
    if new == sizes:
        return
    if opset(c.model) < 13:
        set_attribute(node, "split", new)
        return
    node.attributes.pop("num_outputs", None)
    if len(node.inputs) < 2:
        node.resize_inputs(2)
    node.replace_input_with(1, add_constant(c.model.graph, f"{node.outputs[0].name}_split", np.array(new, np.int64)))


def _gather(c: Coupling, node: ir.Node, labels: Labels, kept: Callable[[Labels], np.ndarray]) -> None:
    """Point a Gather at the new positions of what it selects, without what has left."""
    output = c.axes(node.outputs[0])
    indices = constant(node.inputs[1])
    assert indices is not None
    axis = attribute(node, "axis", 0) % len(c.shape(_data(node)))
    new = indices % len(labels)
    for k in range(indices.ndim):
        own = output[axis + k]
        if own is not None:
            new = np.compress(kept(own), new, axis=k)
    new = (np.cumsum(kept(labels)) - 1)[new].astype(indices.dtype)
    if new.shape != indices.shape or (new != indices).any():
        node.replace_input_with(1, add_constant(c.model.graph, f"{node.outputs[0].name}_indices", new))


def _slice(c: Coupling, node: ir.Node, axis: int, labels: Labels, kept: Callable[[Labels], np.ndarray]) -> None:
    """Point a Slice at the new positions of what it selects on one axis; a Gather does it where they are uneven."""
    keep = kept(labels)
    starts, ends, order, steps = (constant(_in(node, k)) for k in (1, 2, 3, 4))
    assert starts is not None and ends is not None
    rank = len(c.shape(_data(node)))
    where = [int(a) % rank for a in (range(len(starts)) if order is None else order)]
    if axis not in where or keep.all():
        return
    k = where.index(axis)
    chosen = np.arange(len(labels))[_python_slice(int(starts[k]), int(ends[k]), 1 if steps is None else int(steps[k]))]
    position = (np.cumsum(keep) - 1)[chosen[keep[chosen]]]
    name = node.outputs[0].name or node.op_type
    begin, end, step = int(position[0]), int(position[-1]) + 1, 1
    if (np.diff(position) != 1).any():
        chosen_first = add_constant(c.model.graph, f"{name}_indices", position)
        gather = add_node(
            c.model.graph, "Gather", [node.inputs[0], chosen_first], before=node, attributes={"axis": axis}
        )
        node.replace_input_with(0, gather.outputs[0])
        begin, end = 0, len(position)
    for index, old, new in ((1, starts, begin), (2, ends, end), (4, steps, step)):
        if old is not None and old[k] != new:
            array = old.copy()
            array[k] = new
            node.replace_input_with(index, add_constant(c.model.graph, f"{name}_bounds", array))


def _python_slice(start: int, end: int, step: int) -> slice:
    """A Python slice for ONNX's bounds, in which a very negative end means "past the beginning"."""
    return slice(start, None if step < 0 and end < -(1 << 30) else end, step)
