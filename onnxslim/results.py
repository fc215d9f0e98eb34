"""What a change of a model is judged by: the exact results for a sample, and how far others are from them.

Labels, and detections behind non-maximum suppression, say little: they stay what they are until they are another
choice altogether. So the numbers that are chosen by are judged in their place.

Detectors return boxes and scores in one tensor. An error of the scores would hide behind the variance of the
coordinates, so the two are judged apart. Kinds are told by the operators that make them, behind Concat and what moves
numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import runtime, stages
from onnxslim.graph import add_node, is_constant, is_op, opset, subgraphs
from onnxslim.noise import Gap, gaps

# Times the noise of an output that one kind of the numbers in it may have. Scores of a detector are nearly all the same
# number: what rare ones lose is much of their variance before a detection is lost.
KIND = 4.0
# Operators that choose: a small change of their inputs puts results elsewhere, or adds and drops some.
_CHOOSES = ("ArgMax", "ArgMin", "Compress", "Hardmax", "NonMaxSuppression", "NonZero", "TopK", "Unique")
# Operators whose weights are changed: what stands behind them is judged.
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "GRU", "LSTM", "MatMul", "RNN")

# Operators that leave every number of their first input, or of all inputs, what it is.
_MOVES = ("Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

Split = Callable[[Sequence[np.ndarray]], list[np.ndarray]]


def telling(model: ir.Model) -> set[str]:
    """The outputs of ``model`` that tell what a change does to it: not labels, nor what a choice puts in its place."""
    parts, whole = _told(model)
    return {output.name or "" for output in model.graph.outputs}.intersection([*parts, *whole])


class Told:
    """What tells what a change does to ``model``: its outputs, or what they are chosen by.

    That is, instead of an output that is no floating-point number, or that stands where a choice has put it, the
    numbers in front of the first choice; where layers stand behind that, those in front of the last one.

    Attributes:
        model: ``model`` with these values for outputs.
    """

    def __init__(self, model: ir.Model, threads: int) -> None:
        parts, whole = _told(model)
        self._names = [*parts, *whole]
        self._parts = len(parts)
        self.model = self.of(model)
        self._threads = threads

    @functools.cached_property
    def _kinds(self) -> Kinds:
        return Kinds(self.model, self._threads)

    def of(self, model: ir.Model) -> ir.Model:
        """``model``, which has values of these names, with them for outputs; itself where it has them."""
        if self._names == [output.name for output in model.graph.outputs]:
            return model
        clone = model.clone()
        values = {value.name: value for node in clone.graph for value in node.outputs}
        values |= {value.name: value for value in (*clone.graph.inputs, *clone.graph.initializers.values())}
        clone.graph.outputs[:] = [values[name] for name in self._names]
        return clone

    def exact(self, feed: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray]) -> Exact:
        """``outputs`` of `model` for ``feed`` as what others are compared with."""
        return Exact(outputs, self._kinds.split(feed), self._parts)


def _told(model: ir.Model) -> tuple[list[str], list[str]]:
    """The values that tell what a change does: those of which several tell of one output, and the others."""
    layered: set[ir.Value] = set()  # what depends on layers: a choice by anything else stays what it is
    chosen: set[ir.Value] = set()
    for node in model.graph:
        reads = set(stages.reads(node))
        behind = not layered.isdisjoint(reads)
        if not chosen.isdisjoint(reads) or (behind and _has(node, _CHOOSES)):
            chosen.update(node.outputs)
        if behind or _has(node, _LAYERS):
            layered.update(node.outputs)
    parts: dict[str, None] = {}
    whole: dict[str, None] = {}
    for output in model.graph.outputs:
        found, crossed = _in_front(output, lambda value: _is_float(value) and value not in chosen)
        if not found or any(_has(node, _LAYERS) for node in crossed):
            found, _ = _in_front(output, _is_float)
        names = dict.fromkeys(value.name or "" for value in found or [output])
        (parts if len(names) > 1 else whole).update(names)
    return [name for name in parts if name not in whole], list(whole)


def _in_front(output: ir.Value, wanted: Callable[[ir.Value], bool]) -> tuple[list[ir.Value], list[ir.Node]]:
    """The nearest computed values in front of ``output``, or itself, that are ``wanted``, and the nodes behind them."""
    seen: dict[ir.Value, None] = {}
    found: list[ir.Value] = []
    crossed: list[ir.Node] = []
    stack = [output]
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen[value] = None
        if wanted(value):
            found.append(value)
            continue
        crossed.append(node)
        if not is_op(node, "Shape", "Size"):  # these tell nothing of the numbers
            stack.extend(reversed(list(stages.reads(node))))
    return found, crossed


def _has(node: ir.Node, operators: Sequence[str]) -> bool:
    """True when ``node`` is one of ``operators``, or has one in a body."""
    return any(is_op(n, *operators) for n in (node, *(inner for body in subgraphs(node) for inner in body.all_nodes())))


def _is_float(value: ir.Value) -> bool:
    """True where that is not known, too."""
    return value.dtype is None or value.dtype.is_floating_point()


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


class Exact:
    """What is exact for one sample: ``outputs``, of which ``split`` tells the kinds; the first ``parts`` are kinds too.

    Attributes:
        perfect: the gaps of outputs that are exact.
    """

    def __init__(self, outputs: Sequence[np.ndarray], split: Split = lambda _: [], parts: int = 0) -> None:
        self._outputs = outputs
        self._split = split
        self._parts = parts
        self._kinds = self._split(outputs)
        self.perfect = self.gaps(outputs)

    def gaps(self, outputs: Sequence[np.ndarray]) -> list[Gap | None]:
        """Those of the outputs, and those of the kinds in them, of which `KIND` times as much is borne."""
        found = gaps(self._outputs, outputs)
        kinds = gaps(self._kinds, self._split(outputs))
        return [*map(_borne, found[: self._parts]), *found[self._parts :], *map(_borne, kinds)]


def _borne(gap: Gap | None) -> Gap | None:
    return gap and gap._replace(error=gap.error / KIND)


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
