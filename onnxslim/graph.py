"""Small verbs on an onnx_ir graph that several passes need.

onnx_ir leaves some bookkeeping to its callers (a replaced weight keeps its old ``Value.shape``, names may repeat, a
graph output cannot be replaced without losing its name); these functions do it in one place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer, or None when ``value`` is absent or computed at run time."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()


def is_constant(value: ir.Value | None) -> bool:
    """True for an initializer; unlike `constant` it does not read the weights."""
    return value is not None and value.is_initializer() and value.const_value is not None


def set_constant(value: ir.Value, array: np.ndarray) -> None:
    """Give an initializer new content; its type and shape follow. Every user of ``value`` sees the change."""
    tensor = ir.tensor(np.ascontiguousarray(array) if array.ndim else array, name=value.name)
    value.const_value = tensor
    value.shape = ir.Shape(array.shape)
    value.dtype = tensor.dtype


def add_constant(graph: ir.Graph, hint: str, array: np.ndarray) -> ir.Value:
    """Register a new initializer whose name starts with ``hint``."""
    name = fresh_name(graph, hint)
    array = np.asarray(array)
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
    value.dtype = ir.DataType.from_numpy(array.dtype)
    graph.register_initializer(value)
    return value


def add_integers(graph: ir.Graph, hint: str, array: np.ndarray, bits: int) -> ir.Value:
    """Register a new initializer of numbers (uint8) of 8 or of 4 bits; those need opset 21, and two share a byte."""
    if bits == 8:
        return add_constant(graph, hint, array)
    flat = array.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    name = fresh_name(graph, hint)
    tensor = ir.PackedTensor(pairs(flat), ir.DataType.UINT4, shape=array.shape, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value


def pairs(array: np.ndarray) -> np.ndarray:
    """Numbers of four bits, two in each byte along the last axis, the first one in the lower half."""
    return np.asarray(array[..., 0::2] | (array[..., 1::2] << 4), np.uint8)


def add_node(
    graph: ir.Graph,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
    attributes: dict[str, Any] | None = None,
    outputs: int = 1,
    hint: str = "",
    domain: str = "",
    like: ir.Value | None = None,
) -> ir.Node:
    """Insert a node before or after another one (else at the end), with outputs named from ``hint``.

    ``like`` is a value whose type and shape the first output shares.
    """
    hint = hint or (next((v.name for v in inputs if v is not None and v.name), "value"))
    named = [ir.Value(name=fresh_name(graph, f"{hint}_{op_type}")) for _ in range(outputs)]
    if like is not None:
        named[0].type, named[0].shape = like.type, like.shape
    node = ir.node(op_type, inputs, attributes or {}, domain=domain, outputs=named, name=named[0].name)
    if before is not None:
        _graph_of(before, graph).insert_before(before, node)
    elif after is not None:
        _graph_of(after, graph).insert_after(after, node)
    else:
        graph.append(node)
    return node


def fresh_name(graph: ir.Graph, hint: str) -> str:
    """A value name that nothing in ``graph`` or its subgraphs has; the same calls give the same names."""
    used: set[str] = graph.meta.setdefault("onnxslim.names", set())
    if not used:
        used.update(v.name for v in graph.inputs if v.name)
        used.update(name for name in graph.initializers if name)
        used.update(v.name for node in graph.all_nodes() for v in node.outputs if v.name)
        bodies = list(graph.subgraphs())
        used.update(v.name for body in bodies for v in (*body.inputs, *body.initializers.values()) if v.name)
        used.update(node.name for node in graph.all_nodes() if node.name)
    name, count = hint, 1
    while name in used:
        name = f"{hint}_{count}"
        count += 1
    used.add(name)
    return name


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The Python value of an attribute, or ``default`` (give the one of the operator's specification)."""
    found = node.attributes.get(name)
    if found is None or found.value is None:
        return default
    if found.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
        return list(found.value)
    return found.value


def set_attribute(node: ir.Node, name: str, value: Any) -> None:
    """Set an attribute from a Python value (int, float, str, list)."""
    node.attributes[name] = ir.convenience.convert_attribute(name, value)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Make every user of ``old`` read ``new``; when ``old`` is a graph output, the output keeps its name.

    The producer of ``old`` stays, without users: `remove_dead` takes it away.
    """
    if not old.is_graph_output():
        old.replace_all_uses_with(new)
        return
    name = old.name
    graph = old.graph
    assert graph is not None
    producer = old.producer()
    reusable = (
        new.producer() is not None and new.graph is graph and not new.is_graph_output() and not new.is_graph_input()
    )
    if reusable:
        old.name = fresh_name(graph, f"{name}_old")
        new.name = name
        # What the model declares about its output stays declared.
        new.type, new.shape = new.type or old.type, old.shape or new.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        return
    # An input, an initializer or another output cannot be renamed: the output becomes an Identity of it.
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)
    if producer is not None and producer.op_type == "Identity" and producer.inputs[0] is new:
        return
    old.name = fresh_name(graph, f"{name}_old")
    output = ir.Value(name=name, type=old.type, shape=old.shape)
    identity = ir.node("Identity", [new], outputs=[output], name=fresh_name(graph, f"{name}_identity"))
    graph.append(identity)  # nothing in the graph reads it
    for index, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[index] = output


def remove_dead(graph: ir.Graph, start: Iterable[ir.Node] | None = None) -> int:
    """Remove nodes whose outputs nobody reads, and initializers nobody reads; returns the number of nodes removed.

    ``start`` restricts the search to these nodes and what feeds them; without it the whole graph is searched, bodies
    included. What is in the body of a removed node is not counted.
    """
    removed = 0
    gone: set[object] = set()  # bodies of removed nodes
    stack = list(graph.all_nodes()) if start is None else list(start)
    while stack:
        node = stack.pop()
        if node.graph is None or node.graph in gone or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        feeders = [v.producer() for v in node.inputs if v is not None]
        captured = [
            v.producer()
            for attr in node.attributes.values()
            if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for sub in (attr.as_graphs() if attr.type == ir.AttributeType.GRAPHS else [attr.as_graph()])
            for inner in sub.all_nodes()
            for v in inner.inputs
            if v is not None
        ]
        for sub_node in _inner_nodes(node):
            for index in range(len(sub_node.inputs)):
                sub_node.replace_input_with(index, None)
            gone.add(sub_node.graph)
        node.graph.remove(node, safe=True)
        removed += 1
        stack.extend(p for p in (*feeders, *captured) if p is not None and p.graph is not None)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
    return removed


def _inner_nodes(node: ir.Node) -> list[ir.Node]:
    return [
        inner
        for attr in node.attributes.values()
        if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for sub in (attr.as_graphs() if attr.type == ir.AttributeType.GRAPHS else [attr.as_graph()])
        for inner in sub.all_nodes()
    ]


def _graph_of(node: ir.Node, default: ir.Graph) -> ir.Graph:
    return node.graph if isinstance(node.graph, ir.Graph) else default


def known_shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The shape with None for symbolic dimensions, or None when even the rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else None for d in value.shape)


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """True when ``node`` is one of these operators of the standard domain."""
    return node is not None and node.domain in ("", "ai.onnx") and node.op_type in op_types


def walk(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes of the graph and of all bodies in it, in the order in which they end: bodies before their owner."""
    for node in graph:
        for body in subgraphs(node):
            yield from walk(body)
        yield node


def in_branches(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes of the graph and of the branches of If nodes, at any depth: what runs at most once, in its order."""
    for node in graph:
        if is_op(node, "If"):
            for branch in subgraphs(node):
                yield from in_branches(branch)
        yield node


def by_output(graph: ir.Graph) -> dict[str, ir.Node]:
    """Nodes of the graph and its bodies by the name of their first output; the first one where two bodies share it."""
    return {node.outputs[0].name or "": node for node in reversed(list(walk(graph))) if node.outputs}


def captured(node: ir.Node) -> list[ir.Value]:
    """Values that the bodies of ``node`` read or return; those of the graph around it are among them."""
    found: list[ir.Value] = []
    for body in subgraphs(node):
        found.extend(v for inner in body.all_nodes() for v in inner.inputs if v is not None)
        found.extend(body.outputs)
    return found


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs among the attributes of ``node``, in order."""
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS:
            yield from attr.as_graphs()


def is_deterministic(node: ir.Node) -> bool:
    """True when the outputs depend on the inputs alone: a standard operator that draws no random numbers.

    Operators of other domains count as not deterministic: nobody knows what they do.
    """
    if node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = constant(node.inputs[2])
        return training is not None and not training.any()
    return node.op_type not in RANDOM and all(is_deterministic(inner) for sub in subgraphs(node) for inner in sub)


def only_user(value: ir.Value) -> ir.Node | None:
    """The node that alone reads ``value``, once, or None (also when it is a graph output)."""
    uses = value.uses()
    if len(uses) != 1 or value.is_graph_output():
        return None
    return next(iter(uses)).node


def opset(model: ir.Model) -> int:
    """Version of the standard operator set."""
    return model.graph.opset_imports.get("", model.graph.opset_imports.get("ai.onnx", 1))


def count_nodes(model: ir.Model) -> int:
    """Nodes of the graph and of all its subgraphs."""
    return sum(1 for _ in model.graph.all_nodes())
