"""Operators that can run on 8-bit integers: what they read and write, and which of them are worth it.

A `Unit` is one operator together with what a runtime merges into its integer kernel: the Relu or Clip that the
saturation of the result replaces, the row added behind a MatMul. `onnxslim.qdq` inserts the Q/DQ pairs.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection, Hashable, Iterable, Mapping

import numpy as np
import onnx_ir as ir

from onnxslim.graph import (
    attribute,
    constant,
    fresh_name,
    in_branches,
    is_constant,
    is_op,
    known_shape,
    only_user,
    opset,
    subgraphs,
)
from onnxslim.mincut import INFINITE, Network


class Kind(enum.Enum):
    """What a unit is for: PRODUCT does the multiplications, GLUE combines or maps values, MOVE keeps its values."""

    PRODUCT = "product"
    GLUE = "glue"
    MOVE = "move"


@dataclasses.dataclass(frozen=True)
class Unit:
    """An operator that can run on integers.

    Attributes:
        name: of the operator's node; unique in the graph.
        inputs: names of the activations it reads (constants are not among them).
        outputs: names of the values that are stored; for a Relu or Clip behind the operator, what that one writes.
        constants: input indices of constants that are stored as u8, like activations.
        weight: input index and channel axis of the weight of a product, or None.
        tail: Relu or Clip between the operator and its output.
        bias: for a MatMul, the Add of a constant row behind it.
        needs_store: False when the operator also runs on integers with a float result.
    """

    name: str
    kind: Kind
    node: ir.Node
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[int, ...] = ()
    weight: tuple[int, int] | None = None
    tail: ir.Node | None = None
    bias: ir.Node | None = None
    needs_store: bool = True

    @property
    def op(self) -> str:
        """Operator type."""
        return self.node.op_type

    @property
    def nodes(self) -> list[ir.Node]:
        """The operator and what is merged into it."""
        return [n for n in (self.node, self.bias, self.tail) if n is not None]


PRODUCTS = ("Conv", "Gemm", "MatMul")
# Left in float whatever is done, but named: readers look for them among the products.
NEVER = ("ConvTranspose", "LSTM", "GRU", "RNN", "Einsum", "Attention")
MOVES = (
    "MaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Split", "Tile",
    "Expand", "DepthToSpace", "SpaceToDepth", "Identity",
)  # fmt: skip
_UNARY = ("Sigmoid", "LeakyRelu", "AveragePool", "GlobalAveragePool")
_BINARY = ("Add", "Mul")
# Without an integer kernel of their own, but made of operators that have one; see `onnxslim.qdq`.
LOWERED = ("HardSigmoid", "HardSwish")


def name_nodes(model: ir.Model) -> None:
    """Give every node of the main graph a name of its own."""
    _name(model, model.graph)


def name_all_nodes(model: ir.Model) -> None:
    """The same for the nodes of subgraphs, and for what they compute; units and their values are addressed by name.

    Two bodies may use one name for different values.
    """
    _name(model, model.graph.all_nodes())
    seen = {v.name for node in model.graph for v in node.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs if node.graph is not model.graph else ():
            if value.name in seen and value.name:
                value.name = fresh_name(model.graph, value.name)
            seen.add(value.name)


def _name(model: ir.Model, nodes: Iterable[ir.Node]) -> None:
    seen: set[str] = set()
    for node in nodes:
        if not node.name or node.name in seen:
            node.name = fresh_name(model.graph, node.name or f"{node.op_type}_{node.outputs[0].name}")
        seen.add(node.name)


def find_units(model: ir.Model) -> tuple[dict[str, Unit], dict[str, str]]:
    """Units by name in the order of the graph, and products that cannot be one with the reason.

    Units are in the main graph and in the branches of If nodes. What is in the body of a Loop or Scan is computed many
    times, and nobody sees its values.
    """
    units: dict[str, Unit] = {}
    reasons: dict[str, str] = {}
    version = opset(model)
    for node in in_branches(model.graph):
        name = node.name or ""
        if node.graph is not model.graph and any(v.dtype is None for v in node.outputs if v.name):
            if is_op(node, *PRODUCTS, *NEVER):
                reasons[name] = "the type of its result is not known, in a branch where it cannot be looked at"
            continue
        if is_op(node, *PRODUCTS):
            found = _product(node)
            if isinstance(found, str):
                reasons[name] = found
            else:
                units[name] = found
        elif is_op(node, *NEVER):
            reasons[name] = f"{node.op_type} has no static integer kernel"
        elif is_op(node, *MOVES):
            if unit := _move(node, version):
                units[name] = unit
        elif is_op(node, "Resize"):
            if _repeats_pixels(node) and (unit := _move(node, version)):
                units[name] = unit
        elif is_op(node, *_BINARY, *_UNARY, *LOWERED, "Concat") and (unit := _glue(node)):
            units[name] = unit
    for outer in in_branches(model.graph):
        for body in () if is_op(outer, "If") else subgraphs(outer):
            for node in body.all_nodes():
                if is_op(node, *PRODUCTS, *NEVER):
                    reasons[node.name or f"{node.op_type} in {outer.name}"] = (
                        f"in the body of a {outer.op_type}, where no ranges are seen"
                    )
    return units, reasons


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _product(node: ir.Node) -> Unit | str:
    first, second = node.inputs[0], node.inputs[1]
    if not (_is_float(first) and _is_float(second)) or first is None or second is None:
        kind = first.dtype if first is not None and first.dtype is not None else "an unknown type"
        return f"computes in {getattr(kind, 'name', kind)}; only FLOAT is quantized"
    if is_constant(first):
        return "its left operand is constant" if not is_constant(second) else "both operands are constant"
    if not is_constant(second):
        return "both operands are activations"
    shape = known_shape(second) or ()
    output, bias = node.outputs[0], None
    if node.op_type == "Conv":
        axis = 0
    elif node.op_type == "Gemm":
        if any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta")) or attribute(node, "transA", 0):
            return "Gemm with alpha, beta or transA has no integer kernel"
        third = node.inputs[2] if len(node.inputs) > 2 else None
        if third is not None:
            if not is_constant(third):
                return "Gemm with a computed bias has no integer kernel"
            sizes = known_shape(third) or (1,)
            if any(size != 1 for size in sizes[:-1]):
                return "Gemm whose bias is a matrix has no integer kernel"
        axis = 0 if attribute(node, "transB", 0) else 1
    else:
        if len(shape) != 2:
            return f"its weight has {len(shape)} axes; only matrices have integer kernels"
        axis = 1
        bias = row_bias(output, shape[1])
        if bias is not None:
            output = bias.outputs[0]
    if (
        node.op_type == "Conv"
        and len(node.inputs) > 2
        and node.inputs[2] is not None
        and not is_constant(node.inputs[2])
    ):
        return "its bias is computed at run time"
    tail = saturating(output)
    if tail is not None:
        output = tail.outputs[0]
    return Unit(
        node.name or "",
        Kind.PRODUCT,
        node,
        (first.name or "",),
        (output.name or "",),
        weight=(1, axis),
        tail=tail,
        bias=bias,
        needs_store=node.op_type == "Conv",
    )


def row_bias(value: ir.Value, width: int | None) -> ir.Node | None:
    """The Add of a constant row (width,) that alone reads ``value``."""
    node = only_user(value)
    if not is_op(node, "Add") or node is None or node.graph is not value.graph:
        return None
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    return node if is_constant(other) and known_shape(other) == (width,) else None


def saturating(value: ir.Value) -> ir.Node | None:
    """The Relu or Clip that alone reads ``value`` and whose bounds enclose zero."""
    node = only_user(value)
    if node is None or node.graph is not value.graph:
        return None
    if is_op(node, "Relu"):
        return node
    if is_op(node, "Clip") and node.inputs[0] is value and len(node.inputs) >= 2:
        low, high = (constant(v) for v in (*node.inputs[1:3], None)[:2])
        if any(v is not None and not is_constant(v) for v in node.inputs[1:3]):
            return None
        if (low is None or low.item() <= 0) and (high is None or high.item() >= 0):
            return node
    return None


def _move(node: ir.Node, version: int) -> Unit | None:
    source = node.inputs[0]
    if not _is_float(source) or source is None or is_constant(source):
        return None
    if node.op_type == "MaxPool" and (version < 12 or len(node.outputs) > 1):
        return None
    if node.op_type == "Gather" and len(known_shape(source) or ()) == 0:
        return None
    outputs = tuple(v.name or "" for v in node.outputs if v.name)
    return Unit(node.name or "", Kind.MOVE, node, (source.name or "",), outputs)


def _repeats_pixels(node: ir.Node) -> bool:
    """Whether a Resize only repeats values; what it fills the outside with is none of them."""
    outside = attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return bool(attribute(node, "mode", "nearest") == "nearest" and not outside)


def is_finite(unit: Unit) -> bool:
    """Whether the weight and the bias of a product are numbers all."""
    nodes = [unit.node, *([] if unit.bias is None else [unit.bias])]
    arrays = (constant(value) for node in nodes for value in node.inputs if value is not None)
    return all(array is None or bool(np.isfinite(array).all()) for array in arrays)


def _has_range(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.size > 0 and bool(np.isfinite(array).all())


def _glue(node: ir.Node) -> Unit | None:
    if not all(_is_float(v) for v in node.inputs) or len(node.outputs) != 1:
        return None
    if node.op_type == "HardSigmoid" and attribute(node, "alpha", 0.2) <= 0:
        return None
    fixed = tuple(k for k, v in enumerate(node.inputs) if is_constant(v))
    if len(fixed) == len(node.inputs) or not all(_has_range(node.inputs[k]) for k in fixed):
        return None
    inputs = tuple(dict.fromkeys(v.name or "" for v in node.inputs if v is not None and not is_constant(v)))
    output = node.outputs[0]
    tail = saturating(output)
    if tail is not None:
        output = tail.outputs[0]
    return Unit(node.name or "", Kind.GLUE, node, inputs, (output.name or "",), fixed, tail=tail)


def sources(units: Iterable[Unit]) -> dict[str, str]:
    """For every value that a MOVE writes, the value whose scale it shares (through chains of moves)."""
    found: dict[str, str] = {}
    for unit in units:
        if unit.kind is Kind.MOVE:
            for output in unit.outputs:
                found[output] = found.get(unit.inputs[0], unit.inputs[0])
    return found


def connect(units: Mapping[str, Unit]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The unit that writes each value, and the units that read it."""
    writer = {output: unit.name for unit in units.values() for output in unit.outputs}
    readers: dict[str, list[str]] = {}
    for unit in units.values():
        for name in unit.inputs:
            readers.setdefault(name, []).append(unit.name)
    return writer, readers


def stored_values(units: Mapping[str, Unit], chosen: Iterable[str]) -> list[str]:
    """Names of the values that stand between a QuantizeLinear and a DequantizeLinear, in the order of the graph."""
    chosen = frozenset(chosen)
    _, readers = connect(units)
    found: dict[str, None] = {}
    for name, unit in units.items():
        if name not in chosen:
            continue
        found.update(dict.fromkeys(unit.inputs))
        for output in unit.outputs:
            if unit.needs_store or any(r in chosen for r in readers.get(output, ())):
                found[output] = None
    return list(found)


def settle(
    units: Mapping[str, Unit], products: Iterable[str], sizes: Mapping[str, float], barred: Collection[str] = ()
) -> frozenset[str]:
    """The ``products`` and the glue and moves around them with which the fewest elements are stored and read back.

    A value costs its elements when it is written in float and read on integers, once for all readers, and when it is
    written on integers and read in float; what a product gives is in float for nothing where all read it so. Of choices
    that cost the same the one with the least on integers is taken. It is a minimum cut between what is on integers and
    what is not (the products that were not chosen, the ``barred`` units, all other nodes). ``sizes`` are elements per
    value.
    """
    products = frozenset(products)
    writer, readers = connect(units)
    inside = {node for unit in units.values() for node in unit.nodes}
    network = Network()
    integer, floating = object(), object()  # the two sides

    def side(name: str) -> Hashable:
        fixed = units[name].kind is Kind.PRODUCT or name in barred
        return (integer if name in products else floating) if fixed else name

    values = {v.name or "": v for node in inside for v in (*node.inputs, *node.outputs) if v is not None}
    for name in dict.fromkeys(v for unit in units.values() for v in (*unit.inputs, *unit.outputs)):
        value, size = values[name], max(round(sizes.get(name, 1.0)), 1)
        origin = writer.get(name)
        start = floating if origin is None else side(origin)
        ends = {side(r) for r in readers.get(name, ())}
        if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
            ends.add(floating)
        stored, read = ("stored", name), ("read", name)
        for end in ends:
            network.add(end, stored, INFINITE)
            network.add(read, end, INFINITE)
        if start is integer and origin is not None and not units[origin].needs_store:
            network.add(stored, read, size)
            continue
        network.add(stored, start, size)
        network.add(start, read, size)
    _, found = network.cut(integer, floating)
    chosen = products.union(name for name in units if name in found)
    kept: set[str] = set()
    for group in regions(units, chosen):
        if products & group:
            kept |= group
    return frozenset(kept)


def regions(units: Mapping[str, Unit], chosen: Iterable[str]) -> list[set[str]]:
    """The chosen units in groups that pass stored values to each other, in the order of the graph."""
    chosen = set(chosen)
    writer, readers = connect(units)
    groups: list[set[str]] = []
    seen: set[str] = set()
    for start in units:
        if start not in chosen or start in seen:
            continue
        group, stack = {start}, [start]
        while stack:
            unit = units[stack.pop()]
            near = {writer[n] for n in unit.inputs if n in writer}
            near |= {r for n in unit.outputs for r in readers.get(n, ())}
            fresh = (near & chosen) - group
            group |= fresh
            stack.extend(sorted(fresh))
        seen |= group
        groups.append(group)
    return groups
