"""Outputs that are maps, as classifiers of scikit-learn have: onnx_ir has no class for their type.

A model holds such values without a type, as it does where nothing is known about one. The types of outputs are kept in
``Graph.meta``, which a clone of the model has too, and a file that is written says them again.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from onnxslim.errors import ModelError

_TYPES = "onnxslim.maps"


def read(proto: onnx.ModelProto, where: str) -> ir.Model:
    """The model that ``proto``, which stays as it is, describes.

    Raises:
        ModelError: an input is a map.
    """
    if given := [value.name for value in proto.graph.input if _holds_map(value.type)]:
        raise ModelError(f"{where}: input {given[0]!r} is a map: only tensors, sequences and optionals can be given")
    if not any(_holds_map(value.type) for graph in graphs(proto) for value in (*graph.value_info, *graph.output)):
        return ir.from_proto(proto)
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    forget(copy)
    model = ir.from_proto(copy)
    model.graph.meta[_TYPES] = {value.name: value.type for value in proto.graph.output if _holds_map(value.type)}
    return model


def forget(proto: onnx.ModelProto) -> None:
    """Remove the types that onnx_ir cannot hold, in place."""
    for graph in graphs(proto):
        for value in filter(lambda value: _holds_map(value.type), graph.output):
            value.ClearField("type")
        described = [value for value in graph.value_info if not _holds_map(value.type)]
        if len(described) < len(graph.value_info):
            del graph.value_info[:]
            graph.value_info.extend(described)


def restore(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Give the outputs of ``proto``, which was written from ``model``, their types again, in place."""
    types = model.graph.meta.get(_TYPES, {})
    for value in proto.graph.output:
        if value.name in types:
            value.type.CopyFrom(types[value.name])


def graphs(proto: onnx.ModelProto) -> list[onnx.GraphProto]:
    """The graph of a model and those inside it."""
    found = [proto.graph]
    for graph in found:
        found.extend(a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
    return found


def _holds_map(kind: onnx.TypeProto) -> bool:
    """True for a map, and for a sequence or an optional of maps."""
    while (field := kind.WhichOneof("value")) in ("sequence_type", "optional_type"):
        kind = getattr(kind, field).elem_type
    return bool(field == "map_type")
