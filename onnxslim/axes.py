"""Chains of Reshape and Transpose as one permutation of atomic axes, written in as few nodes as it takes.

A chain of views and Transposes cuts the axes of its source into *atoms*, brings these into another order and groups
them into the axes of its result. (b, s, 12, 64) → Transpose → Reshape (12 b, s, 64) → Transpose → Reshape
(b, 12, 64, s) has the atoms b, s, 12 and 64, and its result is their order b, 12, 64, s: one Transpose of the source
does that. In general a Reshape before it (where an axis of the source is torn apart) and one behind it (where axes grow
together) are needed: never more than three nodes, whatever the length of the chain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import symbolic
from onnxslim.atoms import Atoms
from onnxslim.graph import add_constant, add_node, attribute, is_op, only_user, set_attribute
from onnxslim.shape_rules import Shape
from onnxslim.shapes import Shapes
from onnxslim.views import constant_target

# A chain is not followed further back than this; exporters write up to six in a row.
_LONGEST = 16
_VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")


def merge_movements(node: ir.Node, shapes: Shapes, top: ir.Graph) -> bool:
    """Rewrite the chain of views and Transposes that ends in ``node``, if fewer nodes do the same.

    A chain that changes nothing becomes an Identity.
    """
    if not _moves(node):
        return False
    chain = [node]
    while len(chain) < _LONGEST:
        value = chain[-1].inputs[0]
        before = None if value is None else value.producer()
        if value is None or before is None or not _moves(before) or before.graph is not node.graph:
            break
        if only_user(value) is not chain[-1]:
            break
        chain.append(before)
    # The longest chain saves most; where it has no common atoms, or no constant targets, a part of it may.
    for length in range(len(chain), 1, -1):
        steps = _plan(chain[:length][::-1], shapes)
        if steps is not None and len(steps) < length:
            _write(node, chain[length - 1].inputs[0], steps, shapes, top)
            return True
    return False


def _moves(node: ir.Node) -> bool:
    return is_op(node, "Transpose", *_VIEWS) and bool(node.inputs) and node.inputs[0] is not None


def _plan(chain: Sequence[ir.Node], shapes: Shapes) -> list[tuple[str, list[int]]] | None:
    """The nodes, as (operator, permutation or target), that do what ``chain`` does; None when that is not known."""
    source, result = shapes.shape(chain[0].inputs[0]), shapes.shape(chain[-1].outputs[0])
    if source is None or result is None or any(d == 0 for d in (*source, *result)):
        return None
    atoms = Atoms(source)
    for node in chain:
        shape = shapes.shape(node.outputs[0])
        if shape is None:
            return None
        if is_op(node, "Transpose"):
            atoms.transpose(attribute(node, "perm", list(range(len(shape)))[::-1]))
        elif not atoms.view(shape):
            return None
    plans = [_view_only(atoms, source, result), _transpose_first(atoms, source, result)]
    plans += [_reshape_first(atoms, source, result, fine) for fine in (True, False)]
    return min((plan for plan in plans if plan is not None), key=len, default=None)


Plan = list[tuple[str, list[int]]]


def _reshape(old: Shape, new: Shape) -> Plan | None:
    """Nothing where the shapes are equal, else a Reshape, else None."""
    if old == new:
        return []
    target = constant_target(old, new)
    return None if target is None else [("Reshape", target)]


def _view_only(atoms: Atoms, source: Shape, result: Shape) -> Plan | None:
    """The order did not change after all."""
    return _reshape(source, result) if _flat(atoms.source) == _flat(atoms.axes) else None


def _transpose_first(atoms: Atoms, source: Shape, result: Shape) -> Plan | None:
    """A Transpose of the source's own axes, and a Reshape when axes grow together."""
    order = _flat(atoms.axes)
    place = {atom: k for k, atom in enumerate(order)}
    starts = []
    for axis in atoms.source:
        if [place[a] for a in axis] != list(range(place[axis[0]], place[axis[0]] + len(axis))) if axis else False:
            return None  # the axis is torn apart
        starts.append(place[axis[0]] if axis else -1)
    perm = sorted((k for k in range(len(source)) if starts[k] >= 0), key=starts.__getitem__)
    ones = [k for k in range(len(source)) if starts[k] < 0]
    perm = _place_ones(perm, ones, source, result)
    rest = _reshape(tuple(source[p] for p in perm), result)
    return None if rest is None else [("Transpose", perm), *rest]


def _place_ones(perm: list[int], ones: list[int], source: Shape, result: Shape) -> list[int]:
    """``perm`` with the axes of size 1 where the result has some, the others at the end."""
    if len(result) == len(source):
        rest, left = iter(perm), iter(ones)
        if sum(d == 1 for d in result) == len(ones):
            return [next(left) if d == 1 else next(rest) for d in result]
    return [*perm, *ones]


def _reshape_first(atoms: Atoms, source: Shape, result: Shape, fine: bool) -> Plan | None:
    """A Reshape, a Transpose, and where the axes are not those of the result yet (``fine``: they are) a Reshape."""
    order = _flat(atoms.source)
    place = {atom: k for k, atom in enumerate(order)}
    if fine:
        groups = atoms.axes
        for axis in groups:
            if axis and [place[a] for a in axis] != list(range(place[axis[0]], place[axis[0]] + len(axis))):
                return None
    else:
        groups = []
        for atom in _flat(atoms.axes):
            if groups and place[atom] == place[groups[-1][-1]] + 1:
                groups[-1].append(atom)
            else:
                groups.append([atom])
    # In the order of the source; axes of size 1 stay behind the one that they follow in the result.
    keys: list[tuple[int, int]] = []
    for k, axis in enumerate(groups):
        keys.append((place[axis[0]] if axis else (keys[-1][0] if keys else -1), k))
    before = sorted(range(len(groups)), key=keys.__getitem__)
    sizes = [symbolic.product(atoms.size[a] for a in axis) for axis in groups]
    first = _reshape(source, tuple(sizes[k] for k in before))
    last = _reshape(tuple(sizes), result)
    if first is None or last is None:
        return None
    return [*first, ("Transpose", [before.index(k) for k in range(len(groups))]), *last]


def _flat(axes: Sequence[Sequence[int]]) -> list[int]:
    return [atom for axis in axes for atom in axis]


def _write(node: ir.Node, source: ir.Value | None, steps: Plan, shapes: Shapes, top: ir.Graph) -> None:
    """Let ``node`` be the last of ``steps``, behind new nodes for the others."""
    assert source is not None
    value = source
    for k, (op_type, numbers) in enumerate(steps or [("Identity", [])]):
        last = k >= len(steps) - 1
        inputs: list[ir.Value | None] = [value]
        if op_type == "Reshape":
            inputs.append(add_constant(top, f"{node.outputs[0].name}_shape", np.array(numbers, np.int64)))
        if last:
            node.op_type = op_type
            node.attributes.clear()
            node.resize_inputs(len(inputs))
            for index, given in enumerate(inputs):
                node.replace_input_with(index, given)
            target = node
        else:
            target = add_node(top, op_type, inputs, before=node, hint=str(node.outputs[0].name))
            target.outputs[0].type = source.type
        if op_type == "Transpose":
            set_attribute(target, "perm", numbers)
        if not last:
            shapes.visit(target)
            value = target.outputs[0]
