"""Products of one value with several weights, as one product: ``x [W1 W2] + [b1 b2]``, split again behind it.

Queries, keys and values of an attention layer are computed from the same data. One larger product reads it once and
adds one bias. Where all parts are cut into heads next, that is done before they are split. Every number is the sum of
the same products as before. Done when it takes fewer nodes, and when nothing else reads the weights.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.linear import FLOATS, along
from onnxslim.passes.fuse.work import Work

# Larger weights are not copied.
ELEMENTS = 1 << 26


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """One product: its nodes, its weight (in, out), its bias (out,) or None, and the shape its result is cut into."""

    product: ir.Node
    nodes: tuple[ir.Node, ...]
    weight: np.ndarray
    bias: np.ndarray | None
    target: tuple[int, ...] | None = None

    @property
    def result(self) -> ir.Value:
        """What the parts of the one product replace."""
        return self.nodes[-1].outputs[0]

    @property
    def outputs(self) -> int:
        """Channels of the result."""
        return int(self.weight.shape[1])


def merge_parallel(work: Work) -> None:
    """Merge the products of every value with constant matrices."""
    groups: dict[tuple[ir.Value | None, ir.Graph | ir.Function | None], list[ir.Node]] = {}
    for node in work.nodes():
        if g.is_op(node, "MatMul") and _private(node.inputs[1]):
            groups.setdefault((node.inputs[0], node.graph), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _merge(work, nodes)


def _private(value: ir.Value | None) -> bool:
    """True for a float matrix that one node reads."""
    if value is None or not g.is_constant(value) or value.dtype not in FLOATS or value.const_value is None:
        return False
    return len(value.const_value.shape) == 2 and len(value.uses()) == 1 and not value.is_graph_output()


def _merge(work: Work, nodes: list[ir.Node]) -> None:
    weights = [node.inputs[1] for node in nodes]
    sizes = [v.const_value.size for v in weights if v is not None and v.const_value is not None]
    if sum(sizes) > ELEMENTS:
        return
    rank = len(g.known_shape(nodes[0].outputs[0]) or ())
    if rank < 2:
        return
    parts = [_part(node, rank) for node in nodes]
    cut = [_cut_into_heads(part) for part in parts]
    heads = [part for part in cut if part is not None]
    if len(heads) == len(parts) and len({(h.target[:-2], h.target[-1]) for h in heads if h.target is not None}) == 1:
        parts = heads
    biased = any(part.bias is not None for part in parts)
    cutting = parts[0].target is not None
    if sum(len(part.nodes) for part in parts) <= 2 + biased + cutting:
        return
    first, x = nodes[0], nodes[0].inputs[0]
    value = work.insert("MatMul", [x, work.constant(np.concatenate([p.weight for p in parts], 1))], first).outputs[0]
    value.shape = _with(first.outputs[0], -1, sum(part.outputs for part in parts))
    if biased:
        dtype = parts[0].weight.dtype
        bias = [part.bias if part.bias is not None else np.zeros(part.outputs, dtype) for part in parts]
        value, product = work.insert("Add", [value, work.constant(np.concatenate(bias))], first).outputs[0], value
        value.shape = product.shape
    axis, counts = -1, [part.outputs for part in parts]
    if cutting:
        axis, counts = -2, [part.target[-2] for part in parts if part.target is not None]
        assert parts[0].target is not None
        target = np.array([*parts[0].target[:-2], sum(counts), parts[0].target[-1]], np.int64)
        value = work.insert("Reshape", [value, work.constant(target)], first).outputs[0]
        value.shape = _with(parts[0].result, -2, sum(counts))
    work.split(value, axis, counts, first, [part.nodes[-1] for part in parts])
    work.done["merged products"] += len(parts)


def _with(value: ir.Value, axis: int, size: int) -> ir.Shape | None:
    """The shape of ``value`` with another size of one axis."""
    dims = list(value.shape) if value.shape is not None else None
    if dims is None:
        return None
    dims[axis] = size
    return ir.Shape(dims)


def _part(node: ir.Node, rank: int) -> Part:
    """``node`` with the Add of a constant per channel behind it, if there is one."""
    weight = g.constant(node.inputs[1])
    assert weight is not None
    add = g.only_user(node.outputs[0])
    if add is not None and g.is_op(add, "Add") and add.graph is node.graph:
        other = next((v for v in add.inputs if v is not node.outputs[0]), None)
        array = g.constant(other)
        if array is not None:
            bias = along(array, -1, weight.shape[1], rank)
            if bias is not None:
                return Part(node, (node, add), weight, bias)
    return Part(node, (node,), weight, None)


def _cut_into_heads(part: Part) -> Part | None:
    """``part`` with a Reshape behind it that cuts the channels in two axes, if that is all that reads it."""
    reshape = g.only_user(part.result)
    if reshape is None or not g.is_op(reshape, "Reshape") or reshape.graph is not part.product.graph:
        return None
    shape = g.constant(reshape.inputs[1])
    rank = len(g.known_shape(part.result) or ())
    if shape is None or len(shape) != rank + 1 or g.attribute(reshape, "allowzero", 0):
        return None
    target = tuple(int(n) for n in shape)
    if target[-1] * target[-2] != part.outputs:
        return None
    return dataclasses.replace(part, nodes=(*part.nodes, reshape), target=target)
