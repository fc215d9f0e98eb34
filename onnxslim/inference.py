"""The shape inference of onnx on an onnx_ir model: what it finds is written into the values.

onnx_ir's own pass looks every weight up in a list of all of them, and reads the whole model that comes back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from onnxslim import maps, sequences
from onnxslim.graph import subgraphs

# Weights of more bytes than this are given as inputs: only small ones are read for the shapes that they hold.
_READ_BYTES = 1000


def run(model: ir.Model) -> None:
    """Fill in types and shapes of ``model``; what is declared about outputs stays, and so does what is not inferred.

    Nothing is asked where every value has a type and a shape of numbers: no inference would say more.
    """
    nodes = list(model.graph.all_nodes())
    nested = bool(model.functions) or any(True for node in nodes for _ in subgraphs(node))
    if not nested and all(_settled(v) for node in nodes for v in node.outputs if v.name):
        return
    declared = [value.shape for value in model.graph.outputs]
    typed = {v for node in nodes for v in node.outputs if v.type is not None}
    with contextlib.suppress(Exception):  # a graph that inference does not understand is legal, and stays as it is
        with _small(model):
            proto = ir.serde.serialize_model(model)
        found = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
        maps.forget(found)
        if nested:
            _merge_graphs(model, ir.serde.deserialize_model(found))
        else:
            _merge(model.graph, found.graph)
    for value, shape in zip(model.graph.outputs, declared, strict=True):
        value.shape = value.shape if shape is None else shape
    sequences.forget_tensor_types(model.graph, typed, model.opset_imports)


def _settled(value: ir.Value) -> bool:
    return (
        isinstance(value.type, ir.TensorType)
        and value.shape is not None
        and all(isinstance(size, int) for size in value.shape)
    )


@contextlib.contextmanager
def _small(model: ir.Model) -> Iterator[None]:
    """``model`` with every weight among the inputs, and the large ones nowhere else."""
    graph = model.graph
    weights, inputs = dict(graph.initializers), list(graph.inputs)
    for value in weights.values():
        if value.const_value is not None:
            value.shape = ir.Shape(value.const_value.shape.numpy()) if value.shape is None else value.shape
            value.dtype = value.const_value.dtype if value.dtype is None else value.dtype
    try:
        given = set(inputs)
        graph.inputs.extend(value for value in weights.values() if value not in given)
        for name, value in weights.items():
            if value.const_value is None or value.const_value.nbytes > _READ_BYTES:
                del graph.initializers[name]
        yield
    finally:
        graph.initializers.clear()
        graph.initializers.update(weights)
        graph.inputs.clear()
        graph.inputs.extend(inputs)


def _merge(graph: ir.Graph, found: onnx.GraphProto) -> None:
    """Write what was ``found`` about computed values."""
    values = {v.name: v for node in graph for v in node.outputs if v.name}
    for info in (*found.value_info, *found.output):
        value = values.get(info.name)
        if value is None:
            continue
        kind = ir.serde.deserialize_type_proto_for_type(info.type)
        _note(value, ir.serde.deserialize_type_proto_for_shape(info.type), None if kind is None else kind.dtype)


def _merge_graphs(model: ir.Model, found: ir.Model) -> None:
    """`_merge` where graphs have bodies: values of one name are told apart by the graph in which they come first."""
    for graph, inferred in zip(model.graphs(), found.graphs(), strict=False):
        names = ir.convenience.create_value_mapping(inferred)
        for name, value in ir.convenience.create_value_mapping(graph).items():
            if name in names:
                _note(value, names[name].shape, names[name].dtype)


def _note(value: ir.Value, shape: ir.Shape | None, dtype: ir.DataType | None) -> None:
    if shape is not None and value.shape != shape:
        value.shape = shape
    if dtype is not None and value.dtype != dtype:
        value.dtype = dtype
