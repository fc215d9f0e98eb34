"""Pad into the operator that reads it.

* Conv: zeros in front of and behind the spatial axes are what ``pads`` means. Always exact.
* AveragePool: the same with ``count_include_pad=1``, when the pool itself pads nothing or counts its padding already.
* MaxPool: its own padding never wins, so the padded value must never win either: it is the lowest number, or no larger
  than anything the input can hold (0 behind a Relu) while every window still sees part of the input. What that part has
  must be numbers: the maximum of minus infinity and padding differs between runtimes.

Only constant padding by constant amounts, none of them negative, of spatial axes alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import FLOATS
from onnxslim.passes.fold.affine import limits
from onnxslim.passes.fold.work import Work

# Operators that hand on (some of) their input's elements unchanged.
_MOVES = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "GlobalMaxPool", "Slice")
# Operators whose result is finite whatever they read, and those that may make infinities of numbers.
_BOUNDED = ("Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Softsign", "Sin", "Cos")
_INFINITE = ("Log", "Reciprocal")


def absorb_pads(work: Work) -> None:
    """Fold every Pad whose readers all can take it over."""
    for node in work.nodes():
        if g.is_op(node, "Pad"):
            reason = _absorb(work, node)
            if reason is not None:
                work.stays(node, reason)


def _absorb(work: Work, pad: ir.Node) -> str | None:
    source, value = pad.inputs[0], pad.outputs[0]
    users = [use.node for use in value.uses()]
    if not users or not all(g.is_op(u, "Conv", "AveragePool", "MaxPool") for u in users):
        return None  # no candidate
    if value.is_graph_output() or any(use.idx != 0 or use.node.graph is not pad.graph for use in value.uses()):
        return "its result is read by other nodes too"
    padding = _padding(pad)
    if isinstance(padding, str):
        return padding
    assert source is not None
    begin, end, fill = padding
    changes: list[dict[str, object]] = []
    for user in users:
        change = _taken_over(user, source, begin, end, fill)
        if isinstance(change, str):
            return change
        changes.append(change)
    for user, change in zip(users, changes, strict=True):
        for name, setting in change.items():
            g.set_attribute(user, name, setting)
        work.done[f"pad {user.op_type}"] += 1
    g.replace(value, source)
    edit = work.edit()
    edit.drop([pad])
    edit.finish()
    return None


def _padding(pad: ir.Node) -> tuple[list[int], list[int], float] | str:
    """(amounts before, amounts behind, value) of the spatial axes, or why this Pad cannot be folded."""
    mode = g.attribute(pad, "mode", "constant")
    if mode != "constant":
        return f"its mode is {mode!r}"
    if "pads" in pad.attributes or "paddings" in pad.attributes:
        amounts = list(g.attribute(pad, "pads", g.attribute(pad, "paddings", [])))
        fill = float(g.attribute(pad, "value", 0.0))
        rank = len(amounts) // 2
        axes = list(range(rank))
    else:
        inputs = [*pad.inputs, None, None, None][1:4]
        arrays = [g.constant(v) for v in inputs]
        if any(v is not None and a is None for v, a in zip(inputs, arrays, strict=True)) or arrays[0] is None:
            return "its amounts are computed at run time"
        amounts = [int(a) for a in arrays[0]]
        fill = float(arrays[1].reshape(-1)[0]) if arrays[1] is not None and arrays[1].size else 0.0
        shape = g.known_shape(pad.inputs[0])
        if shape is None and arrays[2] is not None:
            return "the rank of its input is unknown"
        rank = len(shape) if shape is not None else len(amounts) // 2
        axes = [int(a) % rank for a in arrays[2]] if arrays[2] is not None else list(range(rank))
    if rank < 3 or len(amounts) != 2 * len(axes):
        return "it pads no spatial axis"
    if any(a < 0 for a in amounts):
        return "it crops (negative amounts)"
    begin, end = [0] * rank, [0] * rank
    for k, axis in enumerate(axes):
        begin[axis], end[axis] = amounts[k], amounts[k + len(axes)]
    if any(begin[:2] + end[:2]):
        return "it pads the batch or channel axis"
    return begin[2:], end[2:], fill


def _taken_over(
    user: ir.Node, source: ir.Value, begin: list[int], end: list[int], fill: float
) -> dict[str, object] | str:
    """The attributes with which ``user`` pads by itself, or why it cannot."""
    spatial = len(begin)
    mode = g.attribute(user, "auto_pad", "NOTSET")
    if mode not in ("NOTSET", "VALID"):
        return f"{user.op_type} behind it computes its own padding (auto_pad={mode})"
    own = g.attribute(user, "pads", [0] * 2 * spatial) if mode == "NOTSET" else [0] * 2 * spatial
    if len(own) != 2 * spatial:
        return f"{user.op_type} behind it has another rank"
    pads = [a + b for a, b in zip(own, begin + end, strict=True)]
    change: dict[str, object] = {"pads": pads}
    if mode == "VALID":
        change["auto_pad"] = "NOTSET"
    if user.op_type == "Conv":
        return change if fill == 0.0 else f"it pads with {fill:g}, Conv with 0"
    kernel = g.attribute(user, "kernel_shape")
    if g.attribute(user, "ceil_mode", 0):
        return f"{user.op_type} behind it rounds its size up (ceil_mode), which depends on where the input ends"
    if any(p >= k for p, k in zip(pads, [*kernel, *kernel], strict=True)) or any(
        d != 1 for d in g.attribute(user, "dilations", [1])
    ):
        return f"a window of {user.op_type} behind it could lie in the padding alone"
    if user.op_type == "AveragePool":
        if fill != 0.0:
            return f"it pads with {fill:g}, AveragePool with 0"
        if any(own) and not g.attribute(user, "count_include_pad", 0):
            return "AveragePool behind it does not count its own padding"
        return {**change, "count_include_pad": 1}
    if len(user.outputs) > 1 and (user.outputs[1].uses() or user.outputs[1].is_graph_output()):
        return "the indices of MaxPool behind it count padded elements"
    if not _never_wins(fill, source):
        return f"it pads with {fill:g}, which can be the maximum of a window"
    return change


def _never_wins(fill: float, source: ir.Value) -> bool:
    if fill == -np.inf:
        return not _made_infinite(source)
    if source.dtype in FLOATS and source.dtype is not None and fill <= limits(source.dtype).lowest:
        return True
    bound = lower_bound(source)
    return bound is not None and fill <= bound


def _made_infinite(value: ir.Value) -> bool:
    """Whether an operator or constant in front of ``value`` makes infinities on purpose (no mere overflow)."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        found = waiting.pop()
        if found in seen:
            continue
        seen.add(found)
        node = found.producer()
        if node is None:
            array = g.constant(found)
            if array is not None and array.dtype.kind in "fV" and bool(np.isinf(array).any()):
                return True
        elif g.is_op(node, *_INFINITE) or (g.is_op(node, "Pad") and np.isinf(g.attribute(node, "value", 0.0))):
            return True
        elif not g.is_op(node, *_BOUNDED):
            waiting += [v for v in node.inputs if v is not None]
    return False


def lower_bound(value: ir.Value | None) -> float | None:
    """A number that no element of ``value`` is below, when the operators before it give one."""
    node = value.producer() if value is not None else None
    while node is not None and g.is_op(node, *_MOVES):
        before = node.inputs[0]
        node = before.producer() if before is not None else None
    if node is None:
        return None
    if g.is_op(node, "Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Softplus"):
        return 0.0
    if g.is_op(node, "Clip"):
        if "min" in node.attributes:
            return float(g.attribute(node, "min"))
        low = g.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return float(low.reshape(())) if low is not None else None
    return None
