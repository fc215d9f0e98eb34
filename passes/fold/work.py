"""What the rules of `fold` share: the model, its constants in float64, counts by rule and reasons for what stays."""

from __future__ import annotations

import collections
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.passes.fold.edit import Edit, Weights


class Work:
    """The state of one run of `fold` over a model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self.graphs = list(model.graphs())
        self.weights = Weights()
        self.done: collections.Counter[str] = collections.Counter()
        self.reasons: dict[ir.Node, str] = {}

    def nodes(self) -> Iterator[ir.Node]:
        """The nodes of the graph and its subgraphs that are still there when their turn comes."""
        for graph in self.graphs:
            for node in list(graph):
                if node.graph is not None:
                    yield node

    def edit(self, *, strict: bool = False) -> Edit:
        """A new transaction on this model."""
        return Edit(self.graph, self.weights, strict=strict)

    def stays(self, node: ir.Node, reason: str) -> None:
        """Note why ``node`` was not folded."""
        self.reasons.setdefault(node, reason)

    def bypass(self, old: ir.Value, new: ir.Value) -> None:
        """Users of ``old`` read ``new``, which holds what ``old`` held; a graph output keeps name, type and shape."""
        if old.is_graph_output() or old.shape is not None:
            new.shape = old.shape
        if new.type is None:
            new.type = old.type
        g.replace(old, new)

    def turn(self, node: ir.Node, op_type: str, x: ir.Value, constant: ir.Value) -> None:
        """Make ``node`` compute ``op_type(x, constant)``; its result keeps name, type, shape and readers."""
        node.op_type = op_type
        node.attributes.clear()
        node.resize_inputs(2)
        node.resize_outputs(1)
        node.replace_input_with(0, x)
        node.replace_input_with(1, constant)

    def add_after(self, value: ir.Value, op_type: str, constant: ir.Value) -> None:
        """Insert ``op_type(value, constant)`` between ``value`` and everything that reads it, graph output or not."""
        producer = value.producer()
        assert producer is not None
        hint = value.name or op_type
        node = g.add_node(self.graph, op_type, [None, constant], after=producer, hint=hint, like=value)
        g.replace(value, node.outputs[0])
        node.replace_input_with(0, value)


def multiply(array: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """``array * factor`` computed in float64; the result has the type of ``array``."""
    if array.dtype == np.float64:
        return array * factor
    result = np.empty(array.shape, array.dtype)
    with np.errstate(over="ignore"):  # an infinite result is refused when it is about to be written
        np.multiply(array, factor, out=result, dtype=np.float64, casting="unsafe")
    return result
