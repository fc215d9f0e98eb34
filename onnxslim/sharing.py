"""One of each: equal weights become one initializer, equal computations one node.

Equality is exact: weights bit by bit, nodes by operator, attributes and the very same inputs. Random operators and
operators of other domains are never merged, and every graph output keeps its name.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import ChainMap
from collections.abc import Hashable, Iterator, MutableMapping

import numpy as np
import onnx_ir as ir

from onnxslim.graph import is_deterministic, replace, subgraphs
from onnxslim.model import forget

# What the weights of a model hash to, and how they begin: keys in Model.meta.
DIGESTS = "onnxslim.digests"
HEADS = "onnxslim.heads"
# Elements that tell most weights from each other.
_HEAD = 16
_COMMUTATIVE = frozenset({"Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Mul", "Or", "Xor"})


def deduplicate_initializers(model: ir.Model) -> tuple[int, int]:
    """Make every use of equal weights read one of them; returns (initializers removed, bytes saved)."""
    groups: dict[Hashable, list[ir.Value]] = {}
    # A tensor never changes, and the same ones come by many times.
    digests, heads = (_known(model, key) for key in (DIGESTS, HEADS))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        groups.setdefault((tensor.dtype, tuple(tensor.shape.numpy()), tensor.nbytes), []).append(value)
    groups = {k: group for key, values in groups.items() if len(values) > 1 for k, group in _alike(key, values, heads)}
    removed = saved = 0
    for values in groups.values():
        if len(values) < 2:
            continue  # the content of a weight without a rival is not even read
        first: dict[bytes, ir.Value] = {}
        # A weight that is a graph output cannot go; let the others become it.
        for value in sorted(values, key=lambda v: not v.is_graph_output()):
            tensor = value.const_value
            assert tensor is not None
            if tensor not in digests:
                digests[tensor] = _digest(tensor)
            original = first.setdefault(digests[tensor], value)
            if original is value or value.is_graph_output():
                continue
            value.replace_all_uses_with(original)
            del model.graph.initializers[str(value.name)]
            removed += 1
            saved += tensor.nbytes
    return removed, saved


def _known(model: ir.Model, key: str) -> weakref.WeakKeyDictionary[ir.TensorProtocol, bytes]:
    known: weakref.WeakKeyDictionary[ir.TensorProtocol, bytes] = model.meta.setdefault(key, weakref.WeakKeyDictionary())
    return known


def _alike(
    key: Hashable, values: list[ir.Value], heads: MutableMapping[ir.TensorProtocol, bytes]
) -> Iterator[tuple[Hashable, list[ir.Value]]]:
    """``values`` apart by how they begin, which tells most weights from each other."""
    groups: dict[bytes, list[ir.Value]] = {}
    for value in values:
        tensor = value.const_value
        assert tensor is not None
        if tensor not in heads:
            heads[tensor] = _head(tensor)
        groups.setdefault(heads[tensor], []).append(value)
    for head, group in groups.items():
        yield (key, head), group


def _head(tensor: ir.TensorProtocol) -> bytes:
    """The first elements of a weight, of which no more is read; nothing where elements have no bytes of their own."""
    if tensor.dtype is ir.DataType.STRING or tensor.dtype.bitwidth < 8:
        return b""
    first = np.array(tensor.numpy().flat[:_HEAD]).tobytes()
    forget(tensor)
    return first


def _digest(tensor: ir.TensorProtocol) -> bytes:
    if tensor.dtype is ir.DataType.STRING:
        return repr(tensor.numpy().tolist()).encode()
    content = tensor.tobytes()
    forget(tensor)  # all weights are read here, one after the other
    return content if len(content) <= 32 else hashlib.sha256(content).digest()


def merge_equal_nodes(model: ir.Model) -> int:
    """Remove nodes that compute what an earlier node has computed; returns their number.

    A node in a subgraph may be replaced by one of the graphs around it, never the other way round.
    """
    return _merge(model.graph, ChainMap[Hashable, ir.Node]())


def _merge(graph: ir.Graph, seen: ChainMap[Hashable, ir.Node]) -> int:
    removed = 0
    for node in graph:
        for inner in subgraphs(node):
            removed += _merge(inner, seen.new_child())
        key = _key(node)
        if key is None:
            continue
        first = seen.get(key)
        if first is None:
            seen[key] = node
            continue
        # Two graph outputs keep their two names: that takes one Identity each, so a second node may not pay.
        identities = sum(
            old.is_graph_output() and (new.is_graph_output() or new.graph is not graph)
            for old, new in zip(node.outputs, first.outputs, strict=True)
        )
        if identities > 1 or (identities and node.op_type == "Identity"):
            continue
        for old, new in zip(node.outputs, first.outputs, strict=True):
            replace(old, new)
        graph.remove(node, safe=True)
        removed += 1
    return removed


def _key(node: ir.Node) -> Hashable | None:
    if not node.inputs or not is_deterministic(node):
        return None
    attributes = []
    for name, attr in sorted(node.attributes.items()):
        value = attribute_key(attr)
        if value is None:
            return None
        attributes.append((name, value))
    inputs = [id(v) for v in node.inputs]
    if node.op_type in _COMMUTATIVE:
        inputs.sort()
    used = tuple(bool(v.name) for v in node.outputs)
    return (node.op_type, tuple(inputs), used, tuple(attributes))


def attribute_key(attr: ir.Attr) -> Hashable | None:
    """Something equal for equal attributes; None for graphs, which are not compared."""
    kind = ir.AttributeType
    if attr.type in (kind.INT, kind.FLOAT, kind.STRING):
        # -0.0 == 0.0 and nan != nan would both be wrong here.
        return (attr.type, np.float64(attr.value).tobytes() if attr.type == kind.FLOAT else attr.value)
    if attr.type in (kind.INTS, kind.STRINGS):
        return (attr.type, tuple(attr.value))
    if attr.type == kind.FLOATS:
        return (attr.type, np.asarray(attr.value, np.float64).tobytes())
    if attr.type == kind.TENSOR:
        tensor = attr.as_tensor()
        return (attr.type, tensor.dtype, tuple(tensor.shape.numpy()), _digest(tensor))
    return None
