"""Numbers of different kinds in one output: detectors return boxes and scores in one tensor.

An error of the scores would hide behind the variance of the coordinates, so the two are judged apart. Kinds are told by
the operators that make them, behind Concat and what moves numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import runtime
from onnxslim.graph import add_node, is_constant, is_op, opset

# Operators that leave every number of their first input, or of all inputs, what it is.
_MOVES = ("Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

Split = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


class Kinds:
    """Splits the outputs of ``model`` by kind.

    Where an output is made of several, a session computes for each sample which element is of which.
    """

    def __init__(self, model: ir.Model, threads: int) -> None:
        clone = model.clone()
        kinds = [opset(model) >= 9 and _label(output) for output in clone.graph.outputs]
        self._names = [output.name or "" for output in clone.graph.outputs]
        self._runner = runtime.load(clone, threads=threads) if any(kinds) else None
        self._mixed = {name for name, found in zip(self._names, kinds, strict=True) if found}

    def split(self, feed: Mapping[str, np.ndarray]) -> Split:
        """A function that gives, of the outputs for ``feed``, those of several kinds as one array of each kind."""
        if self._runner is None:
            return lambda _: []
        told = runtime.run(self._runner, dict(feed))
        labels = [told[name] if name in self._mixed else None for name in self._names]

        def split(outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
            pairs = zip(outputs, labels, strict=False)
            return [
                array[label == kind]
                for array, label in pairs
                if label is not None and label.shape == array.shape
                for kind in np.unique(label)
            ]

        return split


def _label(output: ir.Value) -> bool:
    """Have ``output`` tell the kind of each of its elements, in place; False where they are all of one."""
    edges: list[tuple[ir.Node, int, ir.Value]] = []
    stack = [output]
    while stack:
        node = stack.pop().producer()
        if node is None or not is_op(node, *_MOVES):
            continue
        for index, value in enumerate(node.inputs if node.op_type == "Concat" else node.inputs[:1]):
            if value is None:
                continue
            maker = value.producer()
            if maker is not None and is_op(maker, *_MOVES) and not is_constant(value):
                stack.append(value)
            else:
                edges.append((node, index, value))
    kinds = {_kind(value): k for k, value in enumerate(dict.fromkeys(value for _, _, value in edges))}
    if len(kinds) < 2 or any(value.dtype is None for _, _, value in edges):
        return False
    for node, index, value in edges:
        assert node.graph is not None and value.dtype is not None
        shape = add_node(node.graph, "Shape", [value], before=node)
        number = ir.tensor(np.array([kinds[_kind(value)]]).astype(value.dtype.numpy()))
        filled = add_node(node.graph, "ConstantOfShape", [shape.outputs[0]], before=node, attributes={"value": number})
        node.replace_input_with(index, filled.outputs[0])
    return True


def _kind(value: ir.Value) -> str:
    node = value.producer()
    return node.op_type if node is not None and not is_constant(value) else ""
