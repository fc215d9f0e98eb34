"""Constant folding: what depends on weights alone is computed once, in ONNX Runtime, and stored.

The nodes whose inputs are all constant form components. A component is stored as the values that other nodes read from
it; it is folded only if these take no more bytes than what disappears with it (its nodes, and the weights that nobody
else reads). So ``Tile``, ``Expand``, ``ConstantOfShape`` or the transpose of a shared weight never make the file grow,
while a chain of them that ends in something small is folded whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnxslim import runtime
from onnxslim.contract import Skip
from onnxslim.errors import ModelError
from onnxslim.graph import add_constant, is_constant, is_deterministic, is_op, replace, subgraphs
from onnxslim.shapes import Shapes

# Intermediate results larger than this are not computed, whatever they end in.
MAX_BYTES = 1 << 28
# Each attempt finds one more node per component that ONNX Runtime cannot compute.
MAX_ATTEMPTS = 50
# What a node costs in the file besides its names: tags, lengths, operator, the declared type of its output.
NODE_BYTES = 48
# Small weights travel inside the serialized model, larger ones are fed without a copy.
FED_BYTES = 1024
# Types that ONNX Runtime's Python interface returns as arrays.
_RETURNED = frozenset(
    getattr(ir.DataType, name)
    for name in "BOOL DOUBLE FLOAT FLOAT16 INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64".split()  # noqa: SIM905
)
# Operators that pick some of their input's elements: the size of the result depends on the data, but has a bound.
_SELECTIONS = frozenset({"Compress", "NonZero", "Unique"})
# Quantization that a reader of the file should see: a folded DequantizeLinear is a float weight again.
_KEPT = frozenset({"DequantizeLinear", "Constant", "Loop", "Scan", "If", "SequenceMap"})


@dataclasses.dataclass
class Folding:
    """What `fold_constants` did: nodes folded away, and the values it left to be computed at run time."""

    nodes: int = 0
    skipped: list[Skip] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Component:
    nodes: list[ir.Node]
    stored: list[ir.Value]


def fold_constants(model: ir.Model, shapes: Shapes, failed: dict[str, Skip] | None = None) -> Folding:
    """Replace what only depends on constants by initializers, unless that makes the file larger.

    Args:
        shapes: has visited every node.
        failed: values that ONNX Runtime could not compute before: they are not tried again, and new ones are added.
    """
    result = Folding()
    failed = {} if failed is None else failed
    for _ in range(MAX_ATTEMPTS):
        tried = len(failed)
        result.skipped.clear()
        nodes = _constant_nodes(model.graph, shapes, failed, result)
        components = [c for part in _components(nodes) for c in _worthwhile(part, shapes, result)]
        values = _evaluate(model, components, failed)
        if len(failed) == tried:
            break  # else what led to the values that failed may still be folded
    for component, arrays in values:
        for value, array in zip(component.stored, arrays, strict=True):
            new = add_constant(model.graph, f"{value.name}", array)
            replace(value, new)
        result.nodes += len(component.nodes)
    result.skipped.extend(failed.values())
    return result


def tensor_bytes(value: ir.Value, shapes: Shapes) -> float:
    """Bytes of ``value`` in memory, at most; infinite when nothing bounds them."""
    shape = shapes.static(value)
    if not isinstance(value.type, ir.TensorType) or value.dtype is None or value.dtype not in _RETURNED:
        return math.inf
    if shape is not None:
        return math.prod(shape) * value.dtype.itemsize
    producer = value.producer()
    source = None if producer is None or producer.op_type not in _SELECTIONS else shapes.static(producer.inputs[0])
    if source is None:
        return math.inf
    return math.prod(source) * value.dtype.itemsize * (len(source) if is_op(producer, "NonZero") else 1)


def node_bytes(node: ir.Node) -> int:
    """About what ``node`` takes in the file."""
    names = [node.name or "", node.op_type, *(v.name or "" for v in (*node.inputs, *node.outputs) if v is not None)]
    return NODE_BYTES + sum(map(len, names)) + 16 * len(node.attributes)


def _constant_nodes(graph: ir.Graph, shapes: Shapes, failed: dict[str, Skip], result: Folding) -> dict[ir.Node, None]:
    """Nodes that depend on constants alone, in order, those of subgraphs included."""
    found: dict[ir.Node, None] = {}

    def visit(part: ir.Graph) -> None:
        for node in part:
            for inner in subgraphs(node):
                visit(inner)
            if node.op_type in _KEPT or not node.inputs or not is_deterministic(node):
                continue
            if node.op_type == "Identity" and node.outputs[0].is_graph_output():
                continue  # the form that a constant output takes
            given = (v is None or is_constant(v) or v.producer() in found for v in node.inputs)
            if not all(given) or any(v.name in failed for v in node.outputs):
                continue
            read = [v for v in node.outputs if v.uses() or v.is_graph_output()]
            if sum(tensor_bytes(v, shapes) for v in read) <= MAX_BYTES:
                found[node] = None
            else:
                result.skipped.append(Skip(str(read[0].name), _reason(read[0], shapes)))

    visit(graph)
    return found


def _components(nodes: dict[ir.Node, None]) -> list[_Component]:
    """Weakly connected parts of the graph of constant nodes; nodes that read one large weight belong together."""
    parent: dict[object, object] = {}

    def root(item: object) -> object:
        while parent.setdefault(item, item) is not item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for node in nodes:
        for value in node.inputs:
            if value is None or (is_constant(value) and value.const_value.nbytes <= FED_BYTES):  # type: ignore[union-attr]
                continue
            parent[root(value.producer() or value)] = root(node)
    groups: dict[object, list[ir.Node]] = {}
    for node in nodes:
        groups.setdefault(root(node), []).append(node)
    return [_Component(group, _boundary(group)) for group in groups.values()]


def _boundary(nodes: list[ir.Node]) -> list[ir.Value]:
    """Values that something outside of ``nodes`` reads."""
    inside = set(nodes)
    return [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in inside for use in value.uses())
    ]


def _worthwhile(component: _Component, shapes: Shapes, result: Folding) -> list[_Component]:
    """The parts of a component that can be stored in no more bytes than they free."""
    waiting, accepted = [component], []
    while waiting:
        part = waiting.pop()
        if not part.stored:
            continue
        cost = sum(tensor_bytes(v, shapes) for v in part.stored)
        # A constant graph output becomes an Identity of an initializer: never more of them than nodes that go.
        identities = sum(v.is_graph_output() for v in part.stored)
        if cost <= _freed(part.nodes) and identities <= len(part.nodes):
            accepted.append(part)
            continue
        # What grows most stays a computation, and what follows from it; what leads to it may still be folded.
        largest = max(part.stored, key=lambda v: (_growth(v, shapes), tensor_bytes(v, shapes)))
        result.skipped.append(Skip(largest.name or "", _reason(largest, shapes)))
        rest: dict[ir.Node, None] = {}
        for node in part.nodes:
            given = (v is None or is_constant(v) or v.producer() in rest for v in node.inputs)
            if largest not in node.outputs and all(given):
                rest[node] = None
        waiting.extend(_components(rest))
    return accepted


def _growth(value: ir.Value, shapes: Shapes) -> float:
    """Bytes by which ``value`` exceeds what its node reads, or 0."""
    producer = value.producer()
    assert producer is not None
    read = sum(tensor_bytes(v, shapes) for v in dict.fromkeys(producer.inputs) if v is not None)
    return max(0.0, tensor_bytes(value, shapes) - read) if math.isfinite(read) else 0.0


def _reason(value: ir.Value, shapes: Shapes) -> str:
    size = tensor_bytes(value, shapes)
    if math.isinf(size):
        return "constant, but no tensor whose size is known before it is computed"
    return f"constant, but storing its {size:.0f} bytes would make the file larger"


def _freed(nodes: Iterable[ir.Node]) -> int:
    """Bytes that leave the file with ``nodes``: themselves, and the weights that only they read."""
    inside = set(nodes)
    weights = {v: None for node in inside for v in node.inputs if v is not None and is_constant(v)}
    free = [
        v.const_value.nbytes
        for v in weights
        if v.const_value is not None and not v.is_graph_output() and all(use.node in inside for use in v.uses())
    ]
    return sum(free) + sum(node_bytes(node) for node in inside)


def _evaluate(
    model: ir.Model, components: list[_Component], failed: dict[str, Skip]
) -> list[tuple[_Component, list[np.ndarray]]]:
    """Values of all components; where ONNX Runtime cannot compute one, the node at fault is added to ``failed``."""
    if not components:
        return []
    try:
        arrays = iter(_compute(model, components))
        return [(c, [next(arrays) for _ in c.stored]) for c in components]
    except ModelError as error:
        if len(components) > 1:
            half = len(components) // 2
            halves = (components[:half], components[half:])
            return [pair for part in halves for pair in _evaluate(model, part, failed)]
        for value in _culprit(model, components[0]).outputs:
            failed[str(value.name)] = Skip(str(value.name), f"constant, but not computed: {error}")
        return []


def _culprit(model: ir.Model, component: _Component) -> ir.Node:
    """The first node that ONNX Runtime cannot compute, found by halving."""
    nodes = component.nodes
    good, bad = 0, len(nodes)
    while bad - good > 1:
        middle = (good + bad) // 2
        wanted = [v for node in nodes[:middle] for v in node.outputs if v.dtype in _RETURNED and v.name]
        try:
            _compute(model, [_Component(nodes[:middle], wanted)])
            good = middle
        except ModelError:
            bad = middle
    return nodes[bad - 1]


def _compute(model: ir.Model, components: list[_Component]) -> list[np.ndarray]:
    """Run the nodes of ``components`` and return their stored values in order."""
    copies: dict[ir.Value, ir.Value] = {}
    fed: list[ir.Value] = []
    kept: list[ir.Value] = []
    feeds: dict[str, np.ndarray] = {}
    nodes: list[ir.Node] = []

    def source(value: ir.Value) -> ir.Value:
        copy = copies.get(value)
        if copy is not None:
            return copy
        tensor = value.const_value
        assert tensor is not None
        copy = ir.Value(name=f"v{len(copies)}", type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()))
        plain = tensor.dtype.is_floating_point() or tensor.dtype.is_integer()
        if tensor.nbytes > FED_BYTES and plain and tensor.dtype.itemsize >= 1 and tensor.numpy().dtype.kind in "fiu":
            fed.append(copy)
            feeds[str(copy.name)] = tensor.numpy()
        else:
            copy.const_value = (
                tensor if tensor.dtype is ir.DataType.STRING else ir.tensor(tensor.numpy(), name=copy.name)
            )
            kept.append(copy)
        copies[value] = copy
        return copy

    for component in components:
        for node in component.nodes:
            inputs = [None if v is None else copies.get(v) or source(v) for v in node.inputs]
            outputs = [ir.Value(name=f"v{len(copies) + k}" if v.name else "") for k, v in enumerate(node.outputs)]
            for old, new in zip(node.outputs, outputs, strict=True):
                new.type = old.type
                copies[old] = new
            nodes.append(
                ir.Node("", node.op_type, inputs, node.attributes.values(), outputs=outputs, name=f"n{len(nodes)}")
            )
    wanted = [copies[v] for c in components for v in c.stored]
    graph = ir.Graph(
        fed, wanted, nodes=nodes, initializers=kept, opset_imports=dict(model.graph.opset_imports), name="constants"
    )
    runner = runtime.load(ir.Model(graph, ir_version=max(model.ir_version or 0, 8)), threads=1, optimize=False)
    values = runtime.run(runner, feeds, "constant folding")
    arrays = [values[str(v.name)] for v in wanted]
    stored = [v for c in components for v in c.stored]
    for value, array in zip(stored, arrays, strict=True):
        if not isinstance(array, np.ndarray) or value.dtype is None or array.dtype != value.dtype.numpy():
            raise ModelError(f"{value.name} is not a tensor of type {value.dtype}")
    return arrays
