"""Shapes and integer contents of every tensor, with symbolic sizes, from the inputs and weights alone.

`Shapes` walks the graph once in order. Sizes are `symbolic.Dim`: the named dimensions of the graph inputs stay names,
and arithmetic on them stays exact, so that ``Shape → Gather → Mul → Concat → Reshape`` gives the target as a list of
polynomials. What the file declares about intermediate tensors is not believed (it may be stale); only graph inputs,
weights, and the outputs of operators of unknown domains count.

A size that is 0 at run time is not followed into Reshape, where 0 means the size of the input; every other size is.
Arithmetic that wraps around is not followed: sizes, in multiples that `_MULTIPLES` allows, fit into every type that
they are computed in.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim import grids, shape_elementwise, shape_moves, shape_products, shape_windows, symbolic
from onnxslim.graph import is_constant, opset, subgraphs
from onnxslim.shape_elementwise import RANGES
from onnxslim.shape_rules import MAX_CONTENT, NOTHING, RULES, Call, Fact, Grid, Shape
from onnxslim.symbolic import Dim

__all__ = ["Fact", "Shape", "Shapes"]

_TABLES = (shape_elementwise, shape_moves, shape_products, shape_windows)  # imported for the rules they register
# Float weights of more elements than this are not looked at: shape arithmetic in floats is about scales.
_FLOATS = 8
# Names that exporters write when they mean "any size": two of them are two sizes.
_ANONYMOUS = frozenset({"", "?", "-1", "None", "none", "unk"})


# The largest number of a type over the multiples of sizes that are taken to fit into it.
_MULTIPLES = 1 << 15


class Shapes:
    """Facts about the values of one model.

    ``visit`` the nodes in order (a subgraph after its node's inputs, before its node's outputs); facts of graph inputs
    and weights are found when they are first asked for. A fact stays true when the graph is rewritten without changing
    what its values are.
    """

    def __init__(self, model: ir.Model) -> None:
        self.opset = opset(model)
        self._imports = dict(model.graph.opset_imports)
        self._ir_version = int(model.ir_version or 10)
        self._top = model.graph
        self._facts: dict[ir.Value, Fact] = {}
        self._weights: dict[ir.Value, tuple[ir.TensorProtocol, Fact]] = {}

    def run(self) -> Shapes:
        """Visit every node of the model; returns itself."""
        self._visit_graph(self._top)
        return self

    def fact(self, value: ir.Value) -> Fact:
        """What is known about ``value``."""
        found = self._facts.get(value)
        if found is None:
            if is_constant(value):
                return self._weight(value)
            found = self._input(value) if value.producer() is None else NOTHING
            self._facts[value] = found
        return found

    def shape(self, value: ir.Value | None) -> Shape | None:
        """Sizes of ``value``, or None when not even its rank is known."""
        return None if value is None else self.fact(value).shape

    def content(self, value: ir.Value | None) -> np.ndarray | None:
        """Elements of a small integer or boolean tensor as an object array of `Dim`."""
        return None if value is None else self.fact(value).content

    def grid(self, value: ir.Value | None) -> Grid | None:
        """The grid that the integers or booleans of a tensor are, see `Grid`."""
        return None if value is None or value.dtype not in grids.TYPES else grids.grid_of(self.fact(value))

    def static(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The shape when it is all numbers."""
        shape = self.shape(value)
        if shape is None or not all(isinstance(d, int) for d in shape):
            return None
        return shape  # type: ignore[return-value]

    def call(self, node: ir.Node) -> Call:
        """``node`` with the facts of its inputs."""
        return Call(node, [None if v is None else self.fact(v) for v in node.inputs], self.opset)

    def same(self, value: ir.Value, other: ir.Value) -> None:
        """Record that ``other``, a new value, is the same tensor as ``value``."""
        self._facts[other] = self.fact(value)

    def set(self, value: ir.Value, fact: Fact) -> None:
        """Record what a rewrite knows about a value it made."""
        self._facts[value] = fact

    def visit(self, node: ir.Node) -> None:
        """Find out about the outputs of ``node``."""
        facts = self._infer(node)
        for k, value in enumerate(node.outputs):
            fact = (facts[k] if k < len(facts) else None) or NOTHING
            fact = self._checked(value, fact)
            if k == 0 and fact.shape is not None and fact.content is None and fact.grid is None:
                fact = dataclasses.replace(fact, grid=self._follow(node, fact.shape))
            self._facts[value] = fact

    def _follow(self, node: ir.Node, shape: Shape) -> Grid | None:
        if node.domain not in ("", "ai.onnx") or node.outputs[0].dtype not in grids.TYPES:
            return None
        found = grids.follow(self.call(node), shape)
        ends = () if found is None else (grids.lowest(found, shape), grids.highest(found, shape))
        return found if all(end is None or _holds(node.outputs[0].dtype, end) for end in ends) else None

    def declare(self) -> None:
        """Write the shapes found into the values computed by nodes, for whoever reads them there.

        Numbers and named dimensions are written; where a size is neither, what was declared stays.
        """
        kept = set(self._top.outputs)
        for value, fact in self._facts.items():
            if fact.shape is None or value in kept or not isinstance(value.type, ir.TensorType):
                continue
            old = value.shape
            if value.producer() is None:
                continue
            before = list(old) if old is not None and len(old) == len(fact.shape) else [None] * len(fact.shape)
            sizes = [_plain(dim, was) for dim, was in zip(fact.shape, before, strict=True)]
            if old is None or list(old) != sizes:
                value.shape = ir.Shape(sizes)

    def _visit_graph(self, graph: ir.Graph) -> None:
        for node in graph:
            for inner in subgraphs(node):
                self._visit_graph(inner)
            self.visit(node)

    def _infer(self, node: ir.Node) -> list[Fact | None]:
        standard = node.domain in ("", "ai.onnx")
        rule = RULES.get(node.op_type if standard else f"{node.domain}::{node.op_type}")
        if rule is None and not standard:
            return [_declared(v, trusted=True) for v in node.outputs]
        if node.op_type == "If":
            return self._join(node)
        if rule is not None:
            call = self.call(node)
            if not call.facts or call.facts[0] is not None:
                return list(rule(call))
        if any(True for _ in subgraphs(node)):
            return [_declared(v, trusted=False) for v in node.outputs]
        return self._by_schema(node)

    def _join(self, node: ir.Node) -> list[Fact | None]:
        """What both branches of an If agree on."""
        branches = [[self.fact(v).shape for v in graph.outputs] for graph in subgraphs(node)]
        result: list[Fact | None] = []
        for shapes in zip(*branches, strict=True):
            first = shapes[0]
            if first is None or any(s is None or len(s) != len(first) for s in shapes):
                result.append(NOTHING)
                continue
            columns = zip(*[s for s in shapes if s is not None], strict=True)
            result.append(Fact(tuple(c[0] if len(set(c)) == 1 else symbolic.unknown(0) for c in columns)))
        return result

    def _by_schema(self, node: ir.Node) -> list[Fact | None]:
        """Ask the operator's own shape inference; symbolic sizes travel through it as made-up names."""
        names: dict[Dim, str] = {}
        types: dict[str, Any] = {}
        data: dict[str, Any] = {}
        proto = onnx.NodeProto(op_type=node.op_type)
        for k, value in enumerate(node.inputs):
            proto.input.append("" if value is None else f"i{k}")
            if value is None:
                continue
            if not isinstance(value.type, ir.TensorType) or value.dtype is None:
                return []
            shape = self.shape(value)
            sizes = (
                None
                if shape is None
                else [d if isinstance(d, int) else names.setdefault(d, f"d{len(names)}") for d in shape]
            )
            types[f"i{k}"] = onnx.helper.make_tensor_type_proto(int(value.dtype), sizes)
            if is_constant(value) and value.const_value is not None and value.const_value.size <= MAX_CONTENT:
                data[f"i{k}"] = ir.serde.serialize_tensor(value.const_value)
        proto.output.extend(f"o{k}" if v.name else "" for k, v in enumerate(node.outputs))
        for attr in node.attributes.values():
            proto.attribute.append(ir.serde.serialize_attribute(attr))
        imports = [onnx.helper.make_opsetid(domain, version) for domain, version in self._imports.items()]
        try:
            schema = onnx.defs.get_schema(node.op_type, self.opset, "")
            found = onnx.shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=imports, ir_version=self._ir_version
            )
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError):
            return []  # nothing is known, which is always true
        back = {name: dim for dim, name in names.items()}
        return [_from_proto(found.get(f"o{k}"), back) for k in range(len(node.outputs))]

    def _weight(self, value: ir.Value) -> Fact:
        tensor = value.const_value
        assert tensor is not None
        kept = self._weights.get(value)
        # A pass may give the weight new content, which is another tensor.
        if kept is None or kept[0] is not tensor:
            kept = self._weights[value] = tensor, self._constant(tensor)
        return kept[1]

    def _constant(self, tensor: ir.TensorProtocol) -> Fact:
        shape = tuple(int(d) for d in tensor.shape.numpy())
        floating = tensor.dtype.is_floating_point()
        if tensor.dtype not in RANGES or tensor.size > (_FLOATS if floating else MAX_CONTENT):
            small = tensor.dtype in grids.TYPES and tensor.size <= grids.MAX_WEIGHT
            return Fact(shape, grid=grids.of_weight(tensor.numpy()) if small else None)
        numbers = tensor.numpy().reshape(-1)
        _, high = RANGES[tensor.dtype]
        if floating and not np.all((np.floor(numbers) == numbers) & (np.abs(numbers) <= high)):
            return Fact(shape)
        content = np.empty(shape, object)
        content.reshape(-1)[:] = [int(v) for v in numbers]
        return Fact(shape, content)

    def _input(self, value: ir.Value) -> Fact:
        graph = value.graph
        if graph is not self._top or not value.is_graph_input():
            # An input of a loop body may change its shape from one iteration to the next.
            return NOTHING
        return _declared(value, trusted=True)

    def _checked(self, value: ir.Value, fact: Fact) -> Fact:
        """``fact`` without a content that its type cannot hold, as when arithmetic wraps around."""
        if fact.content is None:
            return fact
        dtype = ir.DataType.INT64 if value.dtype is None else value.dtype
        if dtype not in RANGES or fact.content.size > MAX_CONTENT:
            return Fact(fact.shape)
        return fact if all(_holds(dtype, d) for d in fact.content.reshape(-1)) else Fact(fact.shape)


def _holds(dtype: ir.DataType, dim: Dim) -> bool:
    """Whether a type holds a number as it is; one without bounds, whether it is made of sizes in small multiples."""
    low, high = RANGES[dtype]
    bottom, top = symbolic.bounds(dim)
    if bottom is None or top is None:
        return symbolic.largest_factor(dim) <= max(high // _MULTIPLES, 1)
    return low <= bottom and top <= high


def _declared(value: ir.Value, *, trusted: bool) -> Fact:
    """The declared shape; names of sizes count for graph inputs only, numbers where they are ``trusted``."""
    if value.shape is None or not trusted or not isinstance(value.type, ir.TensorType):
        return NOTHING
    result: list[Dim] = []
    for dim in value.shape:
        if isinstance(dim, int) and dim > 0:
            result.append(dim)
        elif (
            value.is_graph_input()
            and not isinstance(dim, int)
            and dim.value not in _ANONYMOUS
            and dim.value is not None
        ):
            result.append(symbolic.named(str(dim.value)))
        else:
            result.append(symbolic.unknown(0))
    return Fact(tuple(result))


def _plain(dim: Dim, declared: int | ir.SymbolicDim | None) -> int | str | ir.SymbolicDim | None:
    """A size as a file can say it."""
    return dim if isinstance(dim, int) else symbolic.name_of(dim) or declared


def _from_proto(type_proto: Any, names: dict[str, Dim]) -> Fact | None:
    if type_proto is None or not type_proto.HasField("tensor_type") or not type_proto.tensor_type.HasField("shape"):
        return None
    sizes: list[Dim] = []
    for dim in type_proto.tensor_type.shape.dim:
        if dim.HasField("dim_value"):
            sizes.append(int(dim.dim_value))
        else:
            sizes.append(names.get(dim.dim_param, symbolic.unknown(0)))
    return Fact(tuple(sizes))
