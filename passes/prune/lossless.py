"""Channels that can leave without any effect: constant ones, ones that nobody weighs, and copies of others.

Every channel of a value is given a number; equal numbers mean equal channels, whatever the input of the model is. A
channel whose value is known is a constant. Both follow from the weights alone: a filter of zeros gives its bias, two
equal filters give equal channels, and what is applied channel by channel carries both on. (For the numbering of
expressions: Alpern, Wegman & Zadeck, POPL 1988.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping

import numpy as np
import onnx_ir as ir

from onnxslim import coupling
from onnxslim.coupling import Coupling, Family, Site
from onnxslim.graph import attribute, constant, is_constant, is_op, known_shape, opset, set_constant
from onnxslim.linear import Linear, along, float64, view
from onnxslim.passes.prune.measure import units
from onnxslim.passes.prune.record import Kept, composed, kept
from onnxslim.responses import ELEMENTWISE, evaluate

ROUNDS = 8  # what feeds only channels that have left can leave in the next round


@dataclasses.dataclass
class Facts:
    """The channels along ``axis`` (negative) of a value: constants (NaN: unknown) and numbers, (n,) each."""

    axis: int
    constants: np.ndarray
    numbers: np.ndarray


def remove_free(
    model: ir.Model, feeds: Mapping[str, np.ndarray], candidates: Callable[[Coupling], list[Family]], threads: int
) -> tuple[dict[str, int], Kept]:
    """Remove from ``model``, in place, the channels that have no effect; returns how many were what, and what stays.

    Args:
        feeds: one sample.
        candidates: the families that may shrink.
    """
    found = {"dead": 0, "copies": 0}
    left: Kept = {}
    for _ in range(ROUNDS):
        coupled = coupling.analyze(model, feeds, threads=threads)
        known = _Numbering(model).run()
        gone: list[np.ndarray] = []
        for family in candidates(coupled):
            dead, copies = _free_units(coupled, family, known)
            found["dead"] += len(dead)
            found["copies"] += len(copies)
            gone.append(family.atoms[sorted([*dead, *copies])])
        atoms = np.concatenate([np.empty(0, np.int64), *gone]).astype(np.int64)
        if not len(atoms):
            break
        left = composed(left, kept(coupled, atoms))
        coupled.remove(atoms)
    return found, left


def _free_units(coupled: Coupling, family: Family, known: Mapping[ir.Value, Facts]) -> tuple[list[int], list[int]]:
    """Units without effect, and copies; the weights that read them are put right. One unit stays at least."""
    count = len(family.atoms)
    columns = [_columns(coupled, family, site, count) for site in family.sites]
    facts = [_facts(site, known) for site in family.sites]
    dead = [
        u for u in range(count)
        if all(_silent(s, c[u], f) for s, c, f in zip(family.sites, columns, facts, strict=True))
    ][: count - 1]  # fmt: skip
    for u in dead:
        for site, own, fact in zip(family.sites, columns, facts, strict=True):
            if fact is not None:
                _move_to_bias(site, own[u], fact.constants[own[u]])
    copies: list[int] = []
    if all(_mergeable(s, f) for s, f in zip(family.sites, facts, strict=True)):
        first: dict[tuple[int, ...], int] = {}
        for u in (u for u in range(count) if u not in dead):
            key = tuple(int(n) for c, f in zip(columns, facts, strict=True) if f is not None for n in f.numbers[c[u]])
            if first.setdefault(key, u) == u or not key:
                continue
            for site, own in zip(family.sites, columns, strict=True):
                _add_column(site, own[first[key]], own[u])
            copies.append(u)
    return dead, copies


def _columns(coupled: Coupling, family: Family, site: Site, count: int) -> list[np.ndarray]:
    of = units(coupled, family, site.labels)
    return [np.flatnonzero(of == u) for u in range(count)]


def _facts(site: Site, known: Mapping[ir.Value, Facts]) -> Facts | None:
    value = site.operand
    found = known.get(value) if value is not None else None
    return found if found is not None and found.axis == site.axis - site.rank else None


def _silent(site: Site, columns: np.ndarray, fact: Facts | None) -> bool:
    """True when these channels add nothing, or nothing but a constant that the bias can take over."""
    if site.weight >= 0 and not _reading(site, columns).any():
        return True
    if fact is None or np.isnan(fact.constants[columns]).any():
        return False
    if not fact.constants[columns].any():
        return True
    linear = view(site.node)
    return linear is not None and linear.uniform and site.groups == 1 and _alone(site) and _room(linear)


def _room(linear: Linear) -> bool:
    """True when there is a bias that can be changed."""
    value = linear.b
    plain = linear.node.op_type == "Conv" or (linear.gain == linear.bias_gain == 1.0)
    return value is not None and is_constant(value) and len(value.uses()) == 1 and bool(plain) and (
        value.const_value is not None and value.const_value.shape.numpy() == (linear.outputs,)
    )  # fmt: skip


def _alone(site: Site) -> bool:
    weight = site.node.inputs[site.weight]
    return site.weight >= 0 and weight is not None and len(weight.uses()) == 1


def _mergeable(site: Site, fact: Facts | None) -> bool:
    return fact is not None and site.groups == 1 and _alone(site)


def _reading(site: Site, columns: np.ndarray) -> np.ndarray:
    """The factors of these channels, (columns, ...)."""
    array = np.asarray(constant(site.node.inputs[site.weight]))
    if site.groups == 1 or site.node.op_type == "ConvTranspose":
        return np.moveaxis(array, site.weight_axis if site.groups == 1 else 0, 0)[columns]
    inner = len(site.labels) // site.groups
    rows = array.reshape(site.groups, -1, *array.shape[1:])
    return np.stack([rows[c // inner][:, c % inner] for c in columns])


def _move_to_bias(site: Site, columns: np.ndarray, values: np.ndarray) -> None:
    linear = view(site.node)
    if not values.any() or np.isnan(values).any() or linear is None or linear.b is None:
        return
    reading = _reading(site, columns).astype(np.float64)
    # (columns, out, taps...): the output axis is the only one left beside the taps.
    out = reading.reshape(len(columns), linear.outputs, -1).sum(axis=2)
    bias = np.asarray(constant(linear.b))
    set_constant(linear.b, (bias + values @ out).astype(bias.dtype))


def _add_column(site: Site, kept: np.ndarray, leaving: np.ndarray) -> None:
    weight = site.node.inputs[site.weight]
    assert weight is not None
    array = np.asarray(constant(weight)).copy()
    moved = np.moveaxis(array, site.weight_axis, 0)
    moved[kept] += moved[leaving]
    set_constant(weight, array)


class _Numbering:
    """Walks the graph once and derives `Facts`."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._facts: dict[ir.Value, Facts] = {}
        self._numbers: dict[Hashable, int] = {}

    def run(self) -> dict[ir.Value, Facts]:
        """Facts of every value whose channels could be followed."""
        for node in self._model.graph:
            linear = view(node)
            if linear is not None and linear.linear_input:
                self._linear(linear)
            elif is_op(node, *ELEMENTWISE, "Identity"):
                self._elementwise(node)
            elif is_op(node, "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax"):
                self._pooled(node)
            elif is_op(node, "Concat"):
                self._concat(node)
            elif is_op(node, "Flatten", "Reshape", "Squeeze"):
                self._flattened(node)
        return self._facts

    def _number(self, key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _of(self, value: ir.Value, axis: int, count: int) -> Facts:
        """What is known of a value; of one that could not be followed, that its channels are its own."""
        found = self._facts.get(value)
        if found is not None and found.axis == axis and len(found.numbers) == count:
            return found
        shape = known_shape(value)
        shared = shape is not None and len(shape) >= -axis and shape[axis] == 1
        names = [(value, 0 if shared else k) for k in range(count)]
        return Facts(axis, np.full(count, np.nan), np.array([self._number(name) for name in names]))

    def _put(self, value: ir.Value, axis: int, constants: np.ndarray, keys: list[Hashable]) -> None:
        known = [("constant", float(c)) if not np.isnan(c) else k for c, k in zip(constants, keys, strict=True)]
        self._facts[value] = Facts(axis, constants, np.array([self._number(k) for k in known], np.int64))

    def _linear(self, linear: Linear) -> None:
        bias = linear.bias_vector(float64)
        if bias is None or (linear.node.op_type == "MatMul" and linear.kernel):
            return
        matrix = linear.matrix(float64(linear.w))  # (groups, out, in, taps)
        groups, out, count, _ = matrix.shape
        source = self._of(linear.x, linear.in_axis, linear.inputs)
        constants = source.constants.reshape(groups, 1, count)
        known = ~np.isnan(constants) & (linear.uniform | (constants == 0))
        dead = ~matrix.any(axis=3)
        still = (dead | known).all(axis=2).reshape(-1)
        sums = np.einsum("goit,gi->go", matrix, np.where(known, constants, 0)[:, 0]).reshape(-1)
        values = np.where(still, linear.gain * sums + bias, np.nan)
        gain = np.broadcast_to(linear.gain, values.shape)
        keys: list[Hashable] = []
        for k in range(groups * out):
            group = k // out
            inputs = source.numbers.reshape(groups, count)[group].tobytes() if groups > 1 else b""
            keys.append((linear.node, matrix[group, k % out].tobytes(), float(bias[k]), float(gain[k]), inputs))
        self._put(linear.y, linear.out_axis, values, keys)

    def _elementwise(self, node: ir.Node) -> None:
        inputs = [v for v in node.inputs if v is not None]
        shape = known_shape(node.outputs[0])
        followed = next((self._facts[v] for v in inputs if v in self._facts), None)
        if followed is None or shape is None or attribute(node, "approximate", "none") != "none":
            return
        axis, count = followed.axis, len(followed.numbers)
        if len(shape) < -axis or shape[axis] != count:  # one channel that is repeated
            return
        operands: list[np.ndarray | None] = []
        parts: list[list[Hashable]] = []
        for value in node.inputs:
            if value is None:
                operands.append(None)
                continue
            array = along(float64(value), axis, count, len(shape)) if is_constant(value) else None
            if array is not None:
                operands.append(array)
                parts.append([float(a) for a in array])
            else:
                facts = self._of(value, axis, count)
                operands.append(facts.constants)
                parts.append([int(n) for n in facts.numbers])
        result = operands[0] if node.op_type == "Identity" else evaluate(node, operands)
        assert result is not None
        unknown = np.any([np.isnan(o) for o in operands if o is not None], axis=0)
        constants = np.where(unknown, np.nan, result)
        if node.op_type == "Mul":
            constants[np.any([o == 0 for o in operands if o is not None], axis=0)] = 0.0
        how = (node.op_type, tuple(sorted((k, str(a.value)) for k, a in node.attributes.items())))
        self._put(node.outputs[0], axis, constants, [(how, *key) for key in zip(*parts, strict=True)])

    def _pooled(self, node: ir.Node) -> None:
        value = node.inputs[0]
        facts = self._facts.get(value) if value is not None else None
        shape = known_shape(value)
        if facts is None or shape is None:
            return
        axis = facts.axis
        if node.op_type.startswith("Reduce"):
            chosen = attribute(node, "axes")
            if chosen is None:
                found = constant(node.inputs[1]) if len(node.inputs) > 1 else None
                chosen = None if found is None else found.tolist()
            if not chosen:
                return
            reduced = {a - len(shape) if a >= 0 else a for a in chosen}
            if axis in reduced:
                return
            if not attribute(node, "keepdims", 1):
                axis += sum(a > axis for a in reduced)
        elif axis != 1 - len(shape):
            return
        constants = facts.constants
        padded = any(attribute(node, "pads", [])) or attribute(node, "auto_pad", "NOTSET") != "NOTSET"
        if node.op_type == "AveragePool" and attribute(node, "count_include_pad", 0) and padded:
            constants = np.where(constants == 0, 0.0, np.nan)
        self._put(node.outputs[0], axis, constants, [(node, int(n)) for n in facts.numbers])

    def _concat(self, node: ir.Node) -> None:
        shapes = [known_shape(v) for v in node.inputs]
        if any(s is None for s in shapes) or opset(self._model) < 4:
            return
        rank = len(shapes[0] or ())
        axis = attribute(node, "axis", 0) % rank - rank
        sizes = [(s or ())[axis] for s in shapes]
        if not any(v in self._facts and self._facts[v].axis == axis for v in node.inputs if v is not None):
            return
        if any(n is None for n in sizes):
            return
        parts = [self._of(v, axis, int(n or 0)) for v, n in zip(node.inputs, sizes, strict=True) if v is not None]
        self._facts[node.outputs[0]] = Facts(
            axis, np.concatenate([p.constants for p in parts]), np.concatenate([p.numbers for p in parts])
        )

    def _flattened(self, node: ir.Node) -> None:
        """(N, C, 1, 1) becomes (N, C)."""
        value = node.inputs[0]
        facts = self._facts.get(value) if value is not None else None
        before, after = known_shape(value), known_shape(node.outputs[0])
        if facts is None or before is None or after is None or facts.axis != 1 - len(before) or len(after) != 2:
            return
        if all(n == 1 for n in before[2:]) and after[1] == before[1] == len(facts.numbers):
            self._facts[node.outputs[0]] = Facts(-1, facts.constants, facts.numbers)
