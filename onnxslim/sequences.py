"""Values that are no tensors (sequences, maps, optionals), where inference takes them for tensors."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from onnxslim.graph import subgraphs


def forget_tensor_types(graph: ir.Graph, declared: set[ir.Value], imports: Mapping[str, int]) -> None:
    """Take the tensor type from computed values that are none; ``declared`` values keep theirs.

    onnx_ir writes what is inferred about the elements of a sequence as if it were about the value itself. Without a
    type the value is inferred again by whoever loads the model.
    """
    for node in graph:
        for inner in subgraphs(node):
            forget_tensor_types(inner, declared, imports)
        for index, value in enumerate(node.outputs):
            if value not in declared and isinstance(value.type, ir.TensorType) and no_tensor(node, index, imports):
                value.type = value.shape = None


def no_tensor(node: ir.Node, index: int, imports: Mapping[str, int]) -> bool:
    """True when output ``index`` of ``node`` is never a tensor, or is of the same type as something that is none."""
    if node.op_type in ("If", "Loop"):
        outputs = [graph.outputs[index + (node.op_type == "Loop")] for graph in subgraphs(node)]
        return any(not isinstance(value.type, ir.TensorType) and value.producer() is not None for value in outputs)
    try:
        schema = onnx.defs.get_schema(node.op_type, imports.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return False
    if not schema.outputs:
        return False
    formal = schema.outputs[min(index, len(schema.outputs) - 1)]
    if not any(text.startswith("tensor(") for text in formal.types):
        return True
    alike = [
        value
        for value, given in zip(node.inputs, schema.inputs, strict=False)
        if value is not None and given.type_str == formal.type_str
    ]
    return any(not isinstance(v.type, ir.TensorType) and v.type is not None for v in alike) or any(
        v.type is None and (producer := v.producer()) is not None and no_tensor(producer, v.index() or 0, imports)
        for v in alike
    )
