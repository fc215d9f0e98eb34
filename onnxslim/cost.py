"""Parameters, multiply-accumulates (MACs) and bytes of a model, counted from shapes without running it.

What is counted:

* parameters: elements of the weights, each shared weight once. Indices and shapes (int64, bool, string constants) and
  the scales and zero points of quantized tensors describe how to read weights and are not parameters themselves.
* MACs: multiplications of Conv, ConvTranspose, Gemm, MatMul, Einsum, LSTM, GRU, RNN and the attention operators, with
  their integer forms; elementwise work is not counted. A Loop body counts once, a Scan body once per step, an If as
  its dearer branch.
* bytes: the weights as stored.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import inference, runtime
from onnxslim import model as model_io
from onnxslim.errors import ModelError
from onnxslim.graph import attribute, count_nodes
from onnxslim.shapes import Shapes as Facts

Shape = tuple[int, ...]

ELEMENT = 32  # MACs of a product that take as long as giving one number elsewhere, which memory takes longer for


@dataclasses.dataclass(frozen=True)
class NodeCost:
    """One node: output shape (None when unknown), parameters and weight bytes that it is first to use, MACs.

    Who uses a weight that is stored as integers is the node behind its DequantizeLinear.
    """

    name: str
    op_type: str
    output: Shape | None
    parameters: int
    macs: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Totals of a model and the table behind them.

    ``unknown`` names the nodes whose MACs could not be counted because a shape does not follow from the inputs.
    ``activations`` is the largest sum, over the nodes in order, of the bytes that are alive while a node runs (its
    inputs, its outputs, and what later nodes read; nothing is computed in place), without weights; None where a shape
    or type is not known. Bodies of control flow are left out.
    """

    nodes: int
    parameters: int
    macs: int
    bytes: int
    table: tuple[NodeCost, ...]
    unknown: tuple[str, ...] = ()
    activations: int | None = None

    @property
    def work(self) -> float:
        """What a run takes, as MACs: those of products, and `ELEMENT` for each number that a node computes."""
        made = (row.output for row in self.table if row.op_type != "Constant" and row.output is not None)
        return self.macs + ELEMENT * sum(map(math.prod, made))

    def by_op(self) -> dict[str, tuple[int, int, int]]:
        """(count, parameters, MACs) per operator, dearest first."""
        totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
        for row in self.table:
            for k, value in enumerate((1, row.parameters, row.macs)):
                totals[row.op_type][k] += value
        ordered = sorted(totals.items(), key=lambda item: (-item[1][2], -item[1][1], -item[1][0], item[0]))
        return {op: (row[0], row[1], row[2]) for op, row in ordered}


def analyze(model: ir.Model, feed: Mapping[str, np.ndarray] | None = None) -> Cost:
    """Count ``model`` for inputs shaped like those in ``feed``; a symbolic dimension of an input not in it is 1.

    Shapes are derived from the inputs (`onnxslim.shapes`); where that ends (a shape that depends on the contents of an
    input), the sample is run once and the shapes are read off, if there is one and ONNX Runtime accepts the model.
    """
    draft = model.clone()
    _bind(draft, feed or {})
    shapes = _Shapes(model, feed)
    shapes.infer(draft, [node for node in draft.graph.all_nodes() if _rule(node) is not None])
    counter = _Counter(shapes)
    macs = counter.graph(draft.graph)
    return Cost(
        nodes=count_nodes(model),
        parameters=sum(row.parameters for row in counter.table),
        macs=macs,
        bytes=model_io.weight_bytes(model),
        table=tuple(counter.table),
        unknown=tuple(counter.unknown),
        activations=_activations(draft.graph, shapes),
    )


def _activations(graph: ir.Graph, shapes: _Shapes) -> int | None:
    nodes = list(graph)
    kept = set(graph.outputs)
    last: dict[ir.Value, int] = {}
    for k, node in enumerate(nodes):
        inner = (v for body in _subgraphs(node) for each in body.all_nodes() for v in each.inputs)
        for value in (*node.inputs, *inner):
            if value is not None:
                last[value] = k
    alive: dict[ir.Value, int] = {}
    peak = 0
    for value in graph.inputs:
        if value in last:
            size = _size(value, shapes)
            if size is None:
                return None
            alive[value] = size
    for k, node in enumerate(nodes):
        for value in node.outputs:
            if value.name:
                size = _size(value, shapes)
                if size is None:
                    return None
                alive[value] = size
        peak = max(peak, sum(alive.values()))
        ending = [v for v in alive if v not in kept and last.get(v, k) <= k]
        for value in ending:
            del alive[value]
    return peak


def _size(value: ir.Value, shapes: _Shapes) -> int | None:
    """Bytes of a tensor; None where its shape or type is not known."""
    shape = shapes(value)
    if shape is None or value.dtype is None:
        return None
    return math.ceil(math.prod(shape) * value.dtype.itemsize) if value.dtype != ir.DataType.STRING else 0


def counts(node: ir.Node) -> bool:
    """True when ``node`` is of a kind whose multiplications are counted."""
    return _rule(node) is not None


def parameters(model: ir.Model) -> int:
    """Elements of the weights of ``model``."""
    found = {v: _elements(node, v) for node in model.graph.all_nodes() for v in _weights(node)}
    return sum(found.values())


class _Shapes:
    """Concrete shapes of values: derived ones, else inferred ones, else those of a real run."""

    def __init__(self, model: ir.Model, feed: Mapping[str, np.ndarray] | None) -> None:
        self._model = model
        self._feed = feed
        self._facts: Facts | None = None
        self._run: dict[str, Shape] = {}

    def infer(self, draft: ir.Model, nodes: Sequence[ir.Node]) -> None:
        """Find the shapes of ``draft``, with more effort while those that ``nodes`` need are open."""
        self._facts = Facts(draft).run()
        if not self._open(nodes):
            return
        # ONNX's own inference knows the bodies of Scan and Loop; it goes on from what is known.
        for value in (v for node in draft.graph.all_nodes() for v in node.outputs):
            known = self._facts.static(value)
            if known is not None and value.type is not None:  # a shape is part of a type in the file
                value.shape = ir.Shape(known)
        inference.run(draft)
        main = {v.name for node in draft.graph for v in node.outputs}
        names = [name for name in self._open(nodes) if name in main]
        if not names or self._feed is None:
            return
        try:
            for values in runtime.tap(self._model, names, [self._feed]):
                self._run = {name: tuple(np.shape(array)) for name, array in values.items()}
        except ModelError:
            # The model does not run on this sample: its open shapes stay unknown and the caller is told which.
            self._run = {}

    def _open(self, nodes: Sequence[ir.Node]) -> list[str]:
        values = (v for node in nodes for v in (*node.inputs, *node.outputs[:1]) if v is not None)
        return list(dict.fromkeys(str(v.name) for v in values if self(v) is None))

    def __call__(self, value: ir.Value | None) -> Shape | None:
        if value is None:
            return None
        if value.const_value is not None:
            return tuple(value.const_value.shape.numpy())
        known = self._facts.static(value) if self._facts is not None else None
        if known is not None:
            return known
        if value.shape is not None and all(isinstance(d, int) for d in value.shape):
            return tuple(int(d) for d in value.shape if isinstance(d, int))
        return self._run.get(value.name or "")


def _bind(draft: ir.Model, feed: Mapping[str, np.ndarray]) -> None:
    """Write concrete input shapes into ``draft`` and forget the symbolic ones that followed from the old inputs."""
    model_io.forget_shapes(draft)
    for value in draft.graph.inputs:
        if value.name is not None and value.name in feed:
            value.shape = ir.Shape(feed[value.name].shape)
        elif value.shape is not None:
            value.shape = ir.Shape([d if isinstance(d, int) else 1 for d in value.shape])


class _Counter:
    """Walks a graph and its subgraphs; a weight belongs to the first node that uses it."""

    def __init__(self, shapes: _Shapes) -> None:
        self.table: list[NodeCost] = []
        self.unknown: list[str] = []
        self._shapes = shapes
        self._seen: set[ir.Value] = set()

    def graph(self, graph: ir.Graph) -> int:
        return sum(self._node(node) for node in graph)

    def _node(self, node: ir.Node) -> int:
        used = {} if _only_decodes(node) else {w: n for n in (node, *_decoders(node)) for w in _weights(n)}
        fresh = {v: n for v, n in used.items() if v not in self._seen}
        self._seen.update(fresh)
        macs: int | None = 0
        rule = _rule(node)
        if rule is not None:
            macs = rule(node, self._shapes)
        name = node.name or next((v.name for v in node.outputs if v.name), "") or node.op_type
        if macs is None:
            self.unknown.append(name)
        output = self._shapes(node.outputs[0]) if node.outputs else None
        weight_bytes = sum(v.const_value.nbytes for v in fresh if v.const_value is not None)
        parameters = sum(_elements(user, v) for v, user in fresh.items())
        self.table.append(NodeCost(name, node.op_type, output, parameters, macs or 0, weight_bytes))
        return (macs or 0) + self._bodies(node)

    def _bodies(self, node: ir.Node) -> int:
        bodies = [self.graph(graph) for graph in _subgraphs(node)]
        if not bodies:
            return 0
        if node.op_type == "If":
            return max(bodies)
        if node.op_type == "Scan":
            first = self._shapes(node.inputs[len(node.inputs) - int(attribute(node, "num_scan_inputs", 1))])
            axis = (attribute(node, "scan_input_axes", None) or [0])[0]
            return sum(bodies) * (first[axis] if first else 1)
        return sum(bodies)


def _subgraphs(node: ir.Node) -> list[ir.Graph]:
    found: list[ir.Graph] = []
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH:
            found.append(attr.as_graph())
        elif attr.type == ir.AttributeType.GRAPHS:
            found.extend(attr.as_graphs())
    return found


# Positions of scales and zero points, which are not parameters: input index by operator.
_ENCODING: dict[str, tuple[int, ...]] = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "MatMulNBits": (2, 3, 4),
}
_INTEGER_WEIGHT_OPS = {"DequantizeLinear", "QLinearConv", "QGemm"}
_NOT_PARAMETERS = {ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING, ir.DataType.UINT64}


def _weights(node: ir.Node) -> list[ir.Value]:
    encoding = _ENCODING.get(node.op_type, ())
    found = []
    for index, value in enumerate(node.inputs):
        if value is None or value.const_value is None or not value.is_initializer() or index in encoding:
            continue
        dtype = value.const_value.dtype
        if dtype in _NOT_PARAMETERS:
            continue
        if dtype in (ir.DataType.INT32, ir.DataType.INT16) and node.op_type not in _INTEGER_WEIGHT_OPS:
            continue
        found.append(value)
    return found


def _only_decodes(node: ir.Node) -> bool:
    """True for a DequantizeLinear of a weight that another node reads."""
    stored = node.inputs[0] if node.op_type == "DequantizeLinear" and node.inputs else None
    return stored is not None and stored.const_value is not None and bool(node.outputs[0].uses())


def _decoders(node: ir.Node) -> list[ir.Node]:
    producers = [value.producer() for value in node.inputs if value is not None]
    return [producer for producer in producers if producer is not None and _only_decodes(producer)]


def _elements(node: ir.Node, value: ir.Value) -> int:
    """Elements of a weight that ``node`` reads, of which several may be stored in one byte."""
    if node.op_type == "MatMulNBits" and value is node.inputs[1]:
        return int(attribute(node, "K", 0)) * int(attribute(node, "N", 0))
    return math.prod(value.const_value.shape.numpy()) if value.const_value is not None else 0


Rule = Callable[[ir.Node, _Shapes], int | None]


def _conv(data: int, weight: int) -> Rule:
    """N·M·(output pixels)·(C/groups)·(kernel pixels); the weight is (M, C/groups, *kernel)."""

    def count(node: ir.Node, shapes: _Shapes) -> int | None:
        kernel, output = shapes(node.inputs[weight]), shapes(node.outputs[0])
        return None if kernel is None or output is None else math.prod(output) * math.prod(kernel[1:])

    return count


def _conv_transpose(node: ir.Node, shapes: _Shapes) -> int | None:
    """N·C·(input pixels)·(M/groups)·(kernel pixels); the weight is (C, M/groups, *kernel)."""
    data, kernel = shapes(node.inputs[0]), shapes(node.inputs[1])
    return None if data is None or kernel is None else math.prod(data) * math.prod(kernel[1:])


def _gemm(weight: int) -> Rule:
    def count(node: ir.Node, shapes: _Shapes) -> int | None:
        left, output = shapes(node.inputs[0]), shapes(node.outputs[0])
        if left is None or output is None:
            return None
        return math.prod(output) * left[0 if attribute(node, "transA", 0) else 1]

    return count


def _matmul(node: ir.Node, shapes: _Shapes) -> int | None:
    left, output = shapes(node.inputs[0]), shapes(node.outputs[0])
    if left is None or output is None or not left:
        return None
    inner = left[-2] if attribute(node, "transA", 0) and len(left) > 1 else left[-1]
    return math.prod(output) * inner


def _einsum(node: ir.Node, shapes: _Shapes) -> int | None:
    """Product of the sizes of all indices, once for each product of two operands."""
    terms = str(attribute(node, "equation", "")).replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, value in zip(terms, node.inputs, strict=True):
        shape = shapes(value)
        if shape is None:
            return None
        head, dots, tail = term.partition("...")
        hidden = len(shape) - len(head) - len(tail)
        names = [*head, *(f".{hidden - k}" for k in range(hidden if dots else 0)), *tail]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return math.prod(sizes.values()) * (len(terms) - 1)


def _recurrent(gates: int, hidden_axis: int = 2) -> Rule:
    """steps·batch·directions·gates·hidden·(input + hidden); X (steps, batch, input), R (directions, ·, hidden).

    ``hidden_axis`` is 1 where R is transposed.
    """

    def count(node: ir.Node, shapes: _Shapes) -> int | None:
        data, recurrence = shapes(node.inputs[0]), shapes(node.inputs[2])
        if data is None or recurrence is None:
            return None
        directions, hidden = recurrence[0], recurrence[hidden_axis]
        return data[0] * data[1] * directions * gates * hidden * (data[2] + hidden)

    return count


def _attention(node: ir.Node, shapes: _Shapes) -> int | None:
    """Q·Kᵀ and P·V: (batch)·(query heads)·(queries)·(keys)·(head size of K + head size of V)."""
    query, key, value = (shapes(v) for v in node.inputs[:3])
    if query is None or key is None or value is None:
        return None
    past = shapes(node.inputs[4]) if len(node.inputs) > 4 else None
    keys = key[-2] + (past[-2] if past else 0)
    if len(query) == 4:
        return math.prod(query[:3]) * keys * (query[3] + value[3])
    heads, kv_heads = int(attribute(node, "q_num_heads", 1)), int(attribute(node, "kv_num_heads", 1))
    return query[0] * query[1] * keys * (query[2] + value[2] // kv_heads * heads)


def _multi_head_attention(node: ir.Node, shapes: _Shapes) -> int | None:
    query = shapes(node.inputs[0])
    key = shapes(node.inputs[1]) if len(node.inputs) > 1 else None
    value = shapes(node.inputs[2]) if len(node.inputs) > 2 else None
    if query is None or len(query) != 3 or key is None or value is None:
        return None
    keys = key[1] if len(key) == 3 else key[2]
    width = value[2] if len(value) == 3 else value[1] * value[3]
    return query[0] * query[1] * keys * (query[2] + width)


def _packed_attention(node: ir.Node, shapes: _Shapes) -> int | None:
    """Projection to Q, K and V, then attention; input (batch, length, width), weight (width, 3·hidden)."""
    data, weight = shapes(node.inputs[0]), shapes(node.inputs[1])
    if data is None or weight is None:
        return None
    batch, length, width = data
    return batch * length * weight[1] * width + batch * length * length * 2 * (weight[1] // 3)


def _group_query_attention(node: ir.Node, shapes: _Shapes) -> int | None:
    """Scores and weighted sums over what was there before and what comes.

    The query is (batch, length, hidden), or holds the keys and values of all its heads as well; what was there before
    is (batch, heads, length, size).
    """
    first, key, past = (*(node.inputs[k] for k in (0, 1)), node.inputs[3] if len(node.inputs) > 3 else None)
    query, before = shapes(first), None if past is None else shapes(past)
    if query is None or (past is not None and before is None):
        return None
    batch, length, hidden = query
    if key is None:
        heads, others = (int(attribute(node, name, 1)) for name in ("num_heads", "kv_num_heads"))
        hidden = hidden * heads // (heads + 2 * others)
    return batch * length * (length + (before[2] if before else 0)) * 2 * hidden


def _n_bits(node: ir.Node, shapes: _Shapes) -> int | None:
    output = shapes(node.outputs[0])
    return None if output is None else math.prod(output) * int(attribute(node, "K", 0))


_STANDARD: dict[str, Rule] = {
    "Conv": _conv(0, 1),
    "ConvInteger": _conv(0, 1),
    "QLinearConv": _conv(0, 3),
    "DeformConv": _conv(0, 1),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm(1),
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Einsum": _einsum,
    "LSTM": _recurrent(4),
    "GRU": _recurrent(3),
    "RNN": _recurrent(1),
    "Attention": _attention,
}
_MICROSOFT: dict[str, Rule] = {
    "FusedConv": _conv(0, 1),
    "FusedGemm": _gemm(1),
    "QGemm": _gemm(3),
    "FusedMatMul": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "DynamicQuantizeLSTM": _recurrent(4, hidden_axis=1),
    "MatMulNBits": _n_bits,
    "MultiHeadAttention": _multi_head_attention,
    "GroupQueryAttention": _group_query_attention,
    "Attention": _packed_attention,
    "QAttention": _packed_attention,
}


def _rule(node: ir.Node) -> Rule | None:
    if node.domain in ("", "ai.onnx"):
        return _STANDARD.get(node.op_type)
    return _MICROSOFT.get(node.op_type) if node.domain == "com.microsoft" else None
