"""A fold as a transaction: what it does to constants and nodes is weighed before anything is touched."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.passes.fold.affine import limits

# Weights above this many elements stay in their own type: a copy in float64 would cost too much memory.
EXACT_ELEMENTS = 1 << 24
CACHED_ELEMENTS = 1 << 25
# Constants of at most this many elements are kept in float64 once they were read.
SMALL_ELEMENTS = 1 << 8
# Elements of a weight that are looked at together, so that what is computed on the way stays small.
_BLOCK = 1 << 18


class Weights:
    """Constants in float64. What a fold wrote is remembered unrounded, so that folds in a row round once.

    Arrays of more than `EXACT_ELEMENTS` elements are given in their own type. ``saved`` counts the bytes by which the
    file is smaller than at the beginning.
    """

    def __init__(self) -> None:
        self.saved = 0
        self._exact: collections.OrderedDict[ir.Value, np.ndarray] = collections.OrderedDict()
        self._elements = 0
        self._read: dict[ir.Value, tuple[ir.TensorProtocol | None, np.ndarray]] = {}

    def read(self, value: ir.Value) -> np.ndarray:
        """The content of ``value``; never to be changed in place."""
        if value in self._exact:
            return self._exact[value]
        kept = self._read.get(value)
        # A pass may give the weight new content, which is another tensor.
        if kept is not None and kept[0] is value.const_value:
            return kept[1]
        array = g.constant(value)
        assert array is not None
        array = array.astype(np.float64) if array.size <= EXACT_ELEMENTS else array
        if array.size <= SMALL_ELEMENTS:
            # Every rule asks for the constants of elementwise nodes again.
            self._read[value] = value.const_value, array
        return array

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
    eps = limits(dtype).eps
    error, size = np.zeros(matrix.shape[:2]), np.zeros(matrix.shape[:2])
    step = max(1, _BLOCK // max(1, matrix[:, :1].size))
    for start in range(0, matrix.shape[1], step):
        rows = slice(start, start + step)
        part = matrix[:, rows]
        stored = rounded(part, dtype)
        if stored is None:
            return False
        error[:, rows] = np.abs(stored.astype(np.float64) - part).max(axis=(2, 3), initial=0.0)
        size[:, rows] = np.abs(part).max(axis=(2, 3), initial=0.0)
    return not bool(np.any((error > eps * size) & (error > eps**2 * size.max(initial=0.0))))


def faithful(factors: np.ndarray, dtype: ir.DataType) -> bool:
    """False when one of these factors, each by itself, is not `representable` in ``dtype``."""
    return representable(factors.reshape(1, -1, 1, 1), dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class _New:
    """A constant that an `Edit` writes: in full precision, rounded, and the existing one that holds the same."""

    exact: np.ndarray
    stored: np.ndarray
    same: ir.Value | None = None


class Edit:
    """New constants for input slots, and nodes that go; weighs itself, then makes the change whole.

    A weight that others use too is copied only where what disappears weighs as much. A vector that was not there before
    (a bias) may also use up what earlier folds have saved: the file as a whole never grows.

    Args:
        graph: the main graph, where constants live.
        strict: this change alone must not make the file larger, whatever was saved before.
    """

    def __init__(self, graph: ir.Graph, weights: Weights, *, strict: bool = False) -> None:
        self._graph = graph
        self._strict = strict
        self._weights = weights
        self._slots: dict[tuple[ir.Node, int], _New] = {}
        self._dropped: dict[ir.Node, None] = {}
        self._turned: dict[ir.Node, None] = {}
        self._made: list[_New] = []
        self._node_bytes = 0
        self._problem: str | None = None
        self._growth: tuple[int, bool] | None = None

    def give(self, node: ir.Node, index: int, array: np.ndarray, dtype: ir.DataType) -> None:
        """Input ``index`` of ``node`` is to become ``array`` rounded to ``dtype``."""
        stored = self._round(array, dtype)
        if stored is not None:
            self._slots[node, index] = _New(array, stored)

    def make(self, array: np.ndarray, dtype: ir.DataType) -> int:
        """A new constant is needed; `commit` returns it at this position. One that a node that goes read is reused."""
        stored = self._round(array, dtype)
        if stored is None:
            return -1
        read = (value for node in (*self._dropped, *self._turned) for value in node.inputs)
        same = next((v for v in read if v is not None and g.is_constant(v) and _equal(v, stored)), None)
        self._made.append(_New(array, stored, same))
        return len(self._made) - 1

    def expect(self, op_type: str, hint: str | None, like: ir.Value) -> None:
        """One more node of two inputs will be added, its result named from ``hint`` and shaped like ``like``."""
        name = len(hint or "") + len(op_type) + 4
        self._node_bytes += 3 * name + len(op_type) + len(like.name or "") + 24 + _shape_bytes(like)

    def turn(self, node: ir.Node, op_type: str, x: ir.Value) -> None:
        """``node`` stays, with its result, as ``op_type(x, a constant of make)``; see `Work.turn`."""
        self._turned[node] = None
        names = (op_type, x.name, "offset_123", node.outputs[0].name, node.name)
        self._node_bytes += sum(2 + len(name or "") for name in names) - _message_bytes(node)

    def redirect(self, old: ir.Value, new: ir.Value) -> None:
        """The readers of ``old`` will read ``new``, whose name may be longer."""
        longer = len(new.name or "") - len(old.name or "")
        self._node_bytes += longer * (len(old.uses()) if not old.is_graph_output() else -2)

    def drop(self, nodes: Iterable[ir.Node]) -> None:
        """These nodes will go; the caller rewires their results before `finish`."""
        self._dropped.update(dict.fromkeys(nodes))

    def refusal(self) -> str | None:
        """Why the change must not be made, or None: a number out of range, or a larger file."""
        if self._problem is not None:
            return self._problem
        growth, copied = self._growth = self._weigh()
        allowed = 0 if copied or self._strict else max(self._weights.saved, 0)
        if growth <= allowed:
            return None
        if copied:
            users = max(len(old.uses()) for (node, index) in self._slots if (old := _input(node, index)) is not None)
            return f"its weight has {users} uses: a copy would make the file {growth} bytes larger"
        return f"it would make the file {growth} bytes larger"

    def commit(self) -> list[ir.Value]:
        """Write the constants; returns those asked for with `make`."""
        assert self._growth is not None, "commit comes after refusal"
        self._weights.saved -= self._growth[0]
        owned = self._owned()
        written: dict[ir.Value | None, list[ir.Value]] = {}
        made = []
        for new in self._made:
            made.append(new.same if new.same is not None else g.add_constant(self._graph, "offset", new.stored))
            self._weights.remember(made[-1], new.exact)
        for (node, index), new in self._slots.items():
            old = _input(node, index)
            values = written.setdefault(old, [])
            if not any(_equal(value, new.stored) for value in values):
                if old is not None and old in owned and not values:
                    self._weights.write(old, new.exact, new.stored)
                    values.append(old)
                else:
                    values.append(g.add_constant(self._graph, _hint(node, index), new.stored))
                    self._weights.remember(values[-1], new.exact)
            if index >= len(node.inputs):
                node.resize_inputs(index + 1)
            node.replace_input_with(index, next(value for value in values if _equal(value, new.stored)))
        return made

    def finish(self) -> None:
        """Take the dropped nodes away."""
        for node in reversed(self._dropped):
            if node.graph is not None:
                node.graph.remove(node, safe=True)

    def _round(self, array: np.ndarray, dtype: ir.DataType) -> np.ndarray | None:
        stored = rounded(array, dtype)
        if stored is None:
            self._problem = f"a constant would leave the range of {dtype.name.lower()}"
        return stored

    def _owned(self) -> set[ir.Value]:
        """The constants that nobody will read any more, or nobody but the slots that are given new ones."""
        read = {_input(node, index) for node, index in self._slots}
        gone = {**self._dropped, **self._turned}
        read.update(v for node in gone for v in node.inputs if g.is_constant(v))
        read -= {None, *(new.same for new in self._made)}
        return {
            value
            for value in read
            if value is not None
            and not value.is_graph_output()
            and all(use.node in gone or (use.node, use.idx) in self._slots for use in value.uses())
        }

    def _weigh(self) -> tuple[int, bool]:
        """Bytes of the file after minus before, and whether a weight is copied."""
        owned = self._owned()
        added, copied = self._node_bytes, False
        written: dict[ir.Value | None, list[np.ndarray]] = {}
        for (node, index), new in self._slots.items():
            old = _input(node, index)
            arrays = written.setdefault(old, [])
            if any(np.array_equal(a, new.stored) for a in arrays):
                continue
            copied = copied or (old is not None and (old not in owned or bool(arrays)))
            name = len(_hint(node, index)) + (0 if old in owned and not arrays else 4)
            arrays.append(new.stored)
            added += _constant_bytes(new.stored, name) + (name + 2 if old is None else 0)
        added += sum(_constant_bytes(new.stored, 12) for new in self._made if new.same is None)
        freed = sum(_constant_bytes(v.const_value, len(v.name or "")) for v in owned if v.const_value is not None)
        freed += sum(_node_bytes(node) for node in self._dropped)
        return added - freed, copied


def _constant_bytes(tensor: np.ndarray | ir.TensorProtocol, name: int) -> int:
    """Bytes of an initializer whose name has ``name`` letters: content, sizes, name, and the tags around them."""
    return int(tensor.nbytes) + 2 * len(tuple(tensor.shape)) + name + 14


def _node_bytes(node: ir.Node) -> int:
    """Bytes of a node and of what the file says about the shapes of its results."""
    declared = [v for v in node.outputs if not v.is_graph_output() and v.type is not None]
    return _message_bytes(node) + 2 + sum(len(v.name or "") + _shape_bytes(v) for v in declared)


def _message_bytes(node: ir.Node) -> int:
    """At least this many bytes hold operator, name, inputs, outputs and attributes."""
    names = (node.op_type, node.name, *(v.name if v is not None else "" for v in (*node.inputs, *node.outputs)))
    return sum(2 + len(name or "") for name in names) + sum(6 + len(name) for name in node.attributes)


def _shape_bytes(value: ir.Value) -> int:
    return 8 + sum(4 if isinstance(d, int) else 4 + len(d.value or "") for d in value.shape or ())


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _equal(value: ir.Value, stored: np.ndarray) -> bool:
    tensor = value.const_value
    if tensor is None or tuple(tensor.shape.numpy()) != stored.shape or tensor.dtype.numpy() != stored.dtype:
        return False
    return bool(np.array_equal(tensor.numpy(), stored))


def _hint(node: ir.Node, index: int) -> str:
    old = _input(node, index)
    name = old.name if old is not None else None
    return name or f"{node.name or node.op_type}.{'weight' if index == 1 else 'bias'}"
