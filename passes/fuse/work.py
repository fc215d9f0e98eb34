"""What the rules of `fuse` share: the model, the operator set they may use, counts by rule."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g


class Work:
    """The state of one run of `fuse` over a model.

    Attributes:
        newest: version of the operator set whose operators may be used.
        needed: version that those which were used need.
        scaled: a function left a constant factor behind that `fold` should take on.
    """

    def __init__(self, model: ir.Model, newest: int) -> None:
        self.model = model
        self.newest = newest
        self.needed = 0
        self.scaled = False
        self.done: collections.Counter[str] = collections.Counter()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}

    def nodes(self) -> Iterator[ir.Node]:
        """The nodes of the graph and its subgraphs that are still there when their turn comes."""
        for graph in list(self.model.graphs()):
            for node in list(graph):
                if node.graph is not None:
                    yield node

    def require(self, version: int) -> None:
        """Note that an operator of this version of the operator set is used."""
        self.needed = max(self.needed, version)

    def constant(self, array: np.ndarray) -> ir.Value:
        """An initializer with this content, one for all that ask for it."""
        key = (str(array.dtype), array.shape, array.tobytes())
        value = self._constants.get(key)
        if value is None or not value.is_initializer():
            value = self._constants[key] = g.add_constant(self.model.graph, "constant", array)
        return value

    def insert(
        self, op_type: str, inputs: Sequence[ir.Value | None], before: ir.Node, attributes: dict[str, Any] | None = None
    ) -> ir.Node:
        """A new node whose result is like that of ``before``."""
        like = before.outputs[0]
        return g.add_node(
            self.model.graph, op_type, inputs, before=before, attributes=attributes, hint=like.name or "", like=like
        )

    def split(self, value: ir.Value, axis: int, sizes: list[int], before: ir.Node, parts: list[ir.Node]) -> None:
        """Split ``value`` along ``axis`` (negative) into what the readers of the first outputs of ``parts`` read."""
        inputs: list[ir.Value | None] = [value]
        if value.shape is not None:  # before opset 11 Split counts from the front only
            axis += len(value.shape)
        attributes: dict[str, Any] = {"axis": axis}
        if g.opset(self.model) >= 13:
            inputs.append(self.constant(np.array(sizes, np.int64)))
        else:
            attributes["split"] = sizes
        node = g.add_node(self.model.graph, "Split", inputs, before=before, attributes=attributes, outputs=len(parts))
        for new, part in zip(node.outputs, parts, strict=True):
            old = part.outputs[0]
            new.type, new.shape = old.type, old.shape
            g.replace(old, new)
        g.remove_dead(self.model.graph, parts)

    def replace(self, old: ir.Node, new: ir.Node) -> None:
        """The readers of ``old`` read ``new``; ``old`` goes, with what only it needed."""
        g.replace(old.outputs[0], new.outputs[0])
        g.remove_dead(self.model.graph, [old])
