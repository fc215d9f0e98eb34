"""A fold as a transaction: what it does to constants and nodes is weighed before anything is touched."""

from __future__ import annotations

import collections
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.passes.fold.affine import limits

# Weights above this many elements stay in their own type: a copy in float64 would cost too much memory.
EXACT_ELEMENTS = 1 << 24
CACHED_ELEMENTS = 1 << 25
NAME_BYTES = 24  # what a constant or node costs in the file besides its content and the name it is derived from


class Weights:
    """Constants in float64. What a fold wrote is remembered unrounded, so that folds in a row round once.

    Arrays of more than `EXACT_ELEMENTS` elements are given in their own type.
    """

    def __init__(self) -> None:
        self._exact: collections.OrderedDict[ir.Value, np.ndarray] = collections.OrderedDict()
        self._elements = 0

    def read(self, value: ir.Value) -> np.ndarray:
        """The content of ``value``; never to be changed in place."""
        if value in self._exact:
            return self._exact[value]
        array = g.constant(value)
        assert array is not None
        return array.astype(np.float64) if array.size <= EXACT_ELEMENTS else array

    def write(self, value: ir.Value, exact: np.ndarray, stored: np.ndarray) -> None:
        """Give the initializer ``value`` the content ``stored``, which is ``exact`` rounded to its type."""
        g.set_constant(value, stored)
        self.remember(value, exact)

    def remember(self, value: ir.Value, exact: np.ndarray) -> None:
        """Note that the unrounded content of ``value`` is ``exact``."""
        old = self._exact.pop(value, None)
        self._elements += exact.size - (old.size if old is not None else 0)
        self._exact[value] = exact
        while self._elements > CACHED_ELEMENTS:
            self._elements -= self._exact.popitem(last=False)[1].size


def rounded(array: np.ndarray, dtype: ir.DataType) -> np.ndarray | None:
    """``array`` in ``dtype``, or None when a finite number leaves its range."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype.numpy())
    return result if bool(np.all(np.isfinite(result))) else None


def representable(matrix: np.ndarray, dtype: ir.DataType) -> bool:
    """False when a row of ``matrix`` (groups, out, in, taps) loses precision in the subnormal numbers of ``dtype``.

    Rows so small that their error drowns in that of the others (channels that training switched off) do not count.
    """
    if matrix.dtype != np.float64:
        return True  # already in its own type
    stored = rounded(matrix, dtype)
    if stored is None:
        return False
    eps = limits(dtype).eps
    error = np.abs(stored.astype(np.float64) - matrix).max(axis=(2, 3), initial=0.0)
    size = np.abs(matrix).max(axis=(2, 3), initial=0.0)
    return not bool(np.any((error > eps * size) & (error > eps**2 * size.max(initial=0.0))))


class Edit:
    """New constants for input slots, and nodes that go; weighs itself, then makes the change whole.

    Args:
        graph: the main graph, where constants live.
    """

    def __init__(self, graph: ir.Graph, weights: Weights) -> None:
        self._graph = graph
        self._weights = weights
        self._slots: dict[tuple[ir.Node, int], tuple[np.ndarray, np.ndarray, ir.DataType]] = {}
        self._dropped: dict[ir.Node, None] = {}
        self._made: list[tuple[np.ndarray, np.ndarray, ir.Value | None]] = []
        self._new_node_bytes = 0
        self._problem: str | None = None

    def give(self, node: ir.Node, index: int, array: np.ndarray, dtype: ir.DataType) -> None:
        """Input ``index`` of ``node`` is to become ``array`` rounded to ``dtype``."""
        stored = self._round(array, dtype)
        if stored is not None:
            self._slots[node, index] = (array, stored, dtype)

    def make(self, array: np.ndarray, dtype: ir.DataType) -> int:
        """A new constant is needed; `commit` returns it at this position. One that a dropped node read is reused."""
        stored = self._round(array, dtype)
        if stored is None:
            return -1
        same = None
        for node in self._dropped:
            for value in node.inputs:
                if value is not None and g.is_constant(value) and _equal(value, stored):
                    same = value
        self._made.append((array, stored, same))
        return len(self._made) - 1

    def expect(self, hint: str | None) -> None:
        """One more node will be added, its result named from ``hint``."""
        self._new_node_bytes += 2 * NAME_BYTES + 3 * len(hint or "")

    def drop(self, nodes: Iterable[ir.Node]) -> None:
        """These nodes will go; the caller rewires their results before `finish`."""
        self._dropped.update(dict.fromkeys(nodes))

    def refusal(self) -> str | None:
        """Why the change must not be made, or None: a number out of range, or a larger file."""
        if self._problem is not None:
            return self._problem
        growth = self._growth()
        if growth <= 0:
            return None
        shared = max((len(v.uses()) for v, own in self._old_values() if not own), default=0)
        if shared > 1:
            return f"its weight is shared by {shared} nodes: a copy would make the file {growth} bytes larger"
        return f"it would make the file {growth} bytes larger"

    def commit(self) -> list[ir.Value]:
        """Write the constants; returns those asked for with `make`."""
        owned = {value for value, own in self._old_values() if own}
        copies: dict[ir.Value | None, list[ir.Value]] = {}
        made = [self._add("offset", exact, stored, same) for exact, stored, same in self._made]
        for (node, index), (exact, stored, _) in self._slots.items():
            old = node.inputs[index] if index < len(node.inputs) else None
            earlier = next((v for v in copies.get(old, []) if _equal(v, stored)), None)
            if earlier is None:
                if old in owned and old is not None and old not in copies:
                    earlier = old
                    self._weights.write(old, exact, stored)
                else:
                    earlier = self._add(_hint(node, index), exact, stored, None)
                copies.setdefault(old, []).append(earlier)
            if index >= len(node.inputs):
                node.resize_inputs(index + 1)
            node.replace_input_with(index, earlier)
        return made

    def finish(self) -> None:
        """Take the dropped nodes away."""
        for node in reversed(self._dropped):
            if node.graph is not None:
                node.graph.remove(node, safe=True)

    def _add(self, hint: str, exact: np.ndarray, stored: np.ndarray, same: ir.Value | None) -> ir.Value:
        value = same if same is not None else g.add_constant(self._graph, hint, stored)
        self._weights.remember(value, exact)
        return value

    def _round(self, array: np.ndarray, dtype: ir.DataType) -> np.ndarray | None:
        stored = rounded(array, dtype)
        if stored is None:
            self._problem = f"a constant would leave the range of {dtype.name.lower()}"
        return stored

    def _old_values(self) -> list[tuple[ir.Value, bool]]:
        """The constants that slots and dropped nodes read, each with whether nobody else reads it."""
        slots = {(node, index) for node, index in self._slots}
        read = {node.inputs[index]: None for node, index in self._slots if index < len(node.inputs)}
        read.update(dict.fromkeys(v for node in self._dropped for v in node.inputs if g.is_constant(v)))
        return [
            (
                value,
                not value.is_graph_output()
                and all(use.node in self._dropped or (use.node, use.idx) in slots for use in value.uses()),
            )
            for value in read
            if value is not None
        ]

    def _growth(self) -> int:
        """Bytes of the file after minus before: constants with their names, and the nodes that go and come."""
        old_values = self._old_values()
        owned = {value for value, own in old_values if own}
        freed = sum(_bytes(v.const_value) for v in owned if v.const_value is not None)
        written: dict[ir.Value | None, list[np.ndarray]] = {}
        added = self._new_node_bytes
        for (node, index), (_, stored, _) in self._slots.items():
            old = node.inputs[index] if index < len(node.inputs) else None
            arrays = written.setdefault(old, [])
            if any(a.shape == stored.shape and np.array_equal(a, stored) for a in arrays):
                continue
            in_place = old in owned and not arrays
            arrays.append(stored)
            name = len(_hint(node, index))
            added += stored.nbytes + name + 8 + (0 if in_place else NAME_BYTES) + (name + 8 if old is None else 0)
        for _, stored, same in self._made:
            if same is None:
                added += stored.nbytes + 2 * NAME_BYTES
            elif same in owned and same.const_value is not None:
                added += _bytes(same.const_value)
        return added - freed - sum(ir.to_proto(node).ByteSize() for node in self._dropped)


def _bytes(tensor: ir.TensorProtocol) -> int:
    return int(tensor.nbytes) + len(tensor.name or "") + 8


def _equal(value: ir.Value, stored: np.ndarray) -> bool:
    tensor = value.const_value
    if tensor is None or tuple(tensor.shape.numpy()) != stored.shape or tensor.dtype.numpy() != stored.dtype:
        return False
    return bool(np.array_equal(tensor.numpy(), stored))


def _hint(node: ir.Node, index: int) -> str:
    old = node.inputs[index] if index < len(node.inputs) else None
    return (
        old.name if old is not None else None
    ) or f"{node.name or node.op_type}.{'weight' if index == 1 else 'bias'}"
