"""Vectors of sizes that must be computed at run time, in as few nodes as they need.

A vector whose content is known as expressions is the concatenation of numbers and of runs of sizes of tensors at hand:
``[batch, sequence, 12, 64]`` is ``Concat(Shape(x)[0:2], [12, 64])``, whatever chain of Gather, Mul and Unsqueeze
computed it. It is rebuilt so where that takes fewer nodes than the chain has that nobody else needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim.graph import add_constant, add_node, opset, replace, set_attribute, subgraphs
from onnxslim.shape_rules import Fact
from onnxslim.shapes import Shapes
from onnxslim.symbolic import Dim

# A chain longer than this is not measured further: it is long enough.
_MAX_CHAIN = 64
_SOURCES = frozenset({"Shape", "Size"})

Run = tuple[ir.Value, int, int]


class Rebuilder:
    """Rebuilds the size vectors of one model; ``shapes`` has visited every node, and no node is dead."""

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self._top = model.graph
        self._shapes = shapes
        self._runs: dict[tuple[Dim, ...], Run] = {}
        self._sliced = opset(model) >= 15
        self._seen: set[tuple[Dim, ...]] = set()

    def run(self) -> int:
        """Rebuild what pays; returns the number of vectors rebuilt."""
        for value in self._top.inputs:
            self._learn(value)
        changed = 0
        for node in list(self._top):
            if node.graph is None or any(True for _ in subgraphs(node)):
                continue
            for value in node.outputs:
                changed += self._rebuild(value)
                self._learn(value)
        return changed

    def _learn(self, value: ir.Value) -> None:
        """Remember the runs of sizes that Shape of ``value`` gives."""
        shape = self._shapes.shape(value)
        if shape is None or shape in self._seen or not isinstance(value.type, ir.TensorType):
            return
        self._seen.add(shape)
        for start in range(len(shape)):
            for end in range(start + 1, len(shape) + 1):
                whole = start == 0 and end == len(shape)
                if (whole or self._sliced) and not all(isinstance(d, int) for d in shape[start:end]):
                    self._runs.setdefault(shape[start:end], (value, start, end))

    def _rebuild(self, value: ir.Value) -> bool:
        content = self._shapes.content(value)
        if content is None or content.ndim != 1 or value.dtype is not ir.DataType.INT64 or value.is_graph_output():
            return False
        if not value.uses() or all(isinstance(d, int) for d in content):
            return False
        parts = self._parts(tuple(content))
        if parts is None:
            return False
        chain = self._chain(value)
        new_nodes = sum(not isinstance(p, list) for p in parts) + (len(parts) > 1)
        if new_nodes >= len(chain) or any(p[0].producer() in chain for p in parts if not isinstance(p, list)):
            return False
        producer = value.producer()
        assert producer is not None
        vectors = [self._constant(value, p) if isinstance(p, list) else self._shape_node(p, producer) for p in parts]
        if len(vectors) > 1:
            joined = add_node(self._top, "Concat", vectors, before=producer, attributes={"axis": 0}, like=value)
            vectors = [joined.outputs[0]]
        self._shapes.same(value, vectors[0])
        replace(value, vectors[0])
        for node in chain:
            self._top.remove(node, safe=True)
        return True

    def _parts(self, content: tuple[Dim, ...]) -> Sequence[list[int] | Run] | None:
        """Numbers and runs that make up ``content``, the longest runs first come, or None."""
        parts: list[list[int] | Run] = []
        k = 0
        while k < len(content):
            for end in range(len(content), k, -1):
                run = self._runs.get(content[k:end])
                if run is not None:
                    parts.append(run)
                    k = end
                    break
            else:
                number = content[k]
                if not isinstance(number, int):
                    return None
                if parts and isinstance(parts[-1], list):
                    parts[-1].append(number)
                else:
                    parts.append([number])
                k += 1
        return parts

    def _chain(self, value: ir.Value) -> list[ir.Node]:
        """The nodes that are there for ``value`` alone, its producer first."""
        producer = value.producer()
        assert producer is not None
        if len(producer.outputs) > 1:
            return []
        chain = [producer]
        inside = {producer}
        for node in chain:
            if node.op_type in _SOURCES or len(chain) >= _MAX_CHAIN:
                continue
            for source in node.inputs:
                before = None if source is None else source.producer()
                if before is None or before in inside or before.graph is not self._top or any(subgraphs(before)):
                    continue
                if any(v.is_graph_output() or any(u.node not in inside for u in v.uses()) for v in before.outputs):
                    continue
                chain.append(before)
                inside.add(before)
        return chain

    def _constant(self, value: ir.Value, numbers: list[int]) -> ir.Value:
        return add_constant(self._top, f"{value.name}_sizes", np.array(numbers, np.int64))

    def _shape_node(self, run: Run, before: ir.Node) -> ir.Value:
        source, start, end = run
        node = add_node(self._top, "Shape", [source], before=before)
        shape = self._shapes.shape(source)
        assert shape is not None
        if start:
            set_attribute(node, "start", start)
        if end < len(shape):
            set_attribute(node, "end", end)
        output = node.outputs[0]
        output.type, output.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([end - start])
        content = np.empty(end - start, object)
        content[:] = shape[start:end]
        self._shapes.set(output, Fact((end - start,), content))
        return output
