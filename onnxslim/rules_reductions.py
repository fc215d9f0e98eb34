"""The rules of operators that sum, pool or search along axes, for `onnxslim.coupling`.

A sum leaves out what was removed from it just as it adds zeros, so an axis that is summed over is contracted, as in a
matrix product with ones. A mean is such a sum, but the number that it divides by must stay what it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim.channels import Labels
from onnxslim.coupling import Coupling, Site
from onnxslim.graph import (
    add_constant,
    add_node,
    attribute,
    constant,
    is_constant,
    is_op,
    only_user,
    replace,
    set_constant,
)
from onnxslim.rules import data, optional, passed, rule

_SUMS = ("ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum")
_REDUCED = "reduced or pooled along this axis"


@rule("MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool LRN")
def pooling(c: Coupling, node: ir.Node) -> None:
    """The axes behind the channels stay, for LRN the channels too; the others pass."""
    local = node.op_type == "LRN"
    blocked = (1,) if local else range(2, len(c.shape(data(node))))
    axes = passed(c, node, blocked, "normalized over its neighbours" if local else _REDUCED)
    for output in node.outputs:
        if output.name in c.shapes:
            c.set(output, axes)


@rule("ArgMax ArgMin TopK")
def search(c: Coupling, node: ir.Node) -> None:
    """The axis that is searched stays; the others pass."""
    axis = attribute(node, "axis", -1 if node.op_type == "TopK" else 0) % len(c.shape(data(node)))
    _outputs(c, node, passed(c, node, [axis], _REDUCED), {axis})


@rule(
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare"
)
def reduction(c: Coupling, node: ir.Node) -> None:
    """Axes that are summed over are contracted; those of other reductions stay."""
    value = data(node)
    rank = len(c.shape(value))
    chosen = attribute(node, "axes")
    if chosen is None:
        found = c.argument(optional(node, 1))
        chosen = [] if found is None else found.ravel().tolist()
    if not chosen and not attribute(node, "noop_with_empty_axes", 0):
        chosen = range(rank)
    changed = {a % rank for a in chosen}
    summed = {a: x for a in changed if (x := c.axes(value)[a]) is not None and not c.is_elastic(value, a, x)}
    floats = value.dtype is not None and value.dtype.is_floating_point() and not is_constant(value)
    if node.op_type not in _SUMS or not floats:
        summed = {}
    why = _REDUCED
    if summed and _standardizes(node):
        summed, why = {}, "normalized over this axis"
    axes = passed(c, node, sorted(changed - set(summed)), why)
    for axis, labels in summed.items():
        c.sites.append(Site(node, 0, axis, labels, rank=rank))
    if summed and node.op_type == "ReduceMean":
        c.edit(functools.partial(_divide_as_before, c, node, list(summed.values())))
    _outputs(c, node, axes, changed)


def _outputs(c: Coupling, node: ir.Node, axes: Sequence[Labels | None], changed: set[int]) -> None:
    """Label what is left of ``axes`` when those ``changed`` have size 1 or are gone."""
    gone = changed if not attribute(node, "keepdims", 1) and node.op_type != "TopK" else set()
    for output in node.outputs:
        if output.name in c.shapes:
            c.set(output, [x for a, x in enumerate(axes) if a not in gone])


def _standardizes(node: ir.Node) -> bool:
    """True for the mean and the variance of a layer normalization that is written in single operators.

    It keeps its axis for the same reasons as the operator does, and stays something that runtimes recognize.
    """
    value, mean = node.inputs[0], node.outputs[0]
    if node.op_type != "ReduceMean" or value is None:
        return False
    if any(is_op(use.node, "Sub") and use.idx == 1 and use.node.inputs[0] is value for use in mean.uses()):
        return True
    source = value.producer()
    return source is not None and _squares(source)


def _squares(node: ir.Node) -> bool:
    if is_op(node, "Pow"):
        exponent = constant(node.inputs[1])
        return exponent is not None and bool((exponent == 2).all())
    return is_op(node, "Mul") and node.inputs[0] is node.inputs[1]


def _divide_as_before(c: Coupling, node: ir.Node, axes: Sequence[Labels], kept: Callable[[Labels], np.ndarray]) -> None:
    """Let a mean over fewer channels divide by as many as before: multiply it by the share that is left."""
    share = math.prod(float(np.mean(kept(labels))) for labels in axes)
    if share == 1:
        return
    mean = node.outputs[0]
    user = only_user(mean)
    if is_op(user, "Mul") and user is not None:
        factor = user.inputs[1 if user.inputs[0] is mean else 0]
        known = constant(factor)
        if factor is not None and known is not None and known.size == 1 and len(factor.uses()) == 1:
            set_constant(factor, np.asarray(known * share, known.dtype))
            return
    assert mean.dtype is not None
    factor = add_constant(c.model.graph, f"{mean.name}_share", np.array(share, mean.dtype.numpy()))
    scaled = add_node(c.model.graph, "Mul", [mean, factor], after=node, like=mean)
    c.labels[scaled.outputs[0]] = c.labels[mean]
    replace(mean, scaled.outputs[0])
    scaled.replace_input_with(0, mean)
