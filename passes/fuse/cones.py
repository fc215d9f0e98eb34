"""Cones: the nodes between one value and another that is computed from it, weights aside, alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

import onnx_ir as ir

from onnxslim import graph as g


@dataclasses.dataclass(frozen=True, eq=False)
class Cone:
    """``nodes``, in order, compute ``root`` from ``leaf`` and constants; nothing else reads what is in between."""

    leaf: ir.Value
    root: ir.Value
    nodes: tuple[ir.Node, ...]


def cones(root: ir.Node, operators: Collection[str], order: dict[ir.Node, float], most: int) -> Iterator[Cone]:
    """The cones that end at ``root``, smallest first, with at most ``most`` nodes, all of ``operators``.

    Args:
        order: position of every node of the graph.
    """
    inside: dict[ir.Node, None] = {root: None}
    open_values = _computed(root)
    while True:
        if len(open_values) == 1 and _closed(inside, root):
            leaf = next(iter(open_values))
            yield Cone(leaf, root.outputs[0], tuple(sorted(inside, key=order.__getitem__)))
        # The last of the open values to be computed cannot be what all of them come from, unless it is the only one.
        producers = {v.producer() for v in open_values}
        known = [p for p in producers if p is not None and p in order]
        if not known or len(inside) >= most:
            return
        node = max(known, key=order.__getitem__)
        if not g.is_op(node, *operators) or node.graph is not root.graph:
            return
        inside[node] = None
        del open_values[node.outputs[0]]
        open_values.update(_computed(node))
        if len(open_values) > 3:
            return


def _computed(node: ir.Node) -> dict[ir.Value, None]:
    return {v: None for v in node.inputs if v is not None and not g.is_constant(v)}


def _closed(inside: Collection[ir.Node], root: ir.Node) -> bool:
    """True when nobody outside reads a value of ``inside`` but the result of ``root``."""
    return all(
        not node.outputs[0].is_graph_output() and all(use.node in inside for use in node.outputs[0].uses())
        for node in inside
        if node is not root
    )
