"""What nobody reads goes: nodes, weights, and the optional outputs of nodes that stay."""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir

from onnxslim.graph import opset, remove_dead, subgraphs

# The number of outputs is a setting of these operators, or runtimes want the outputs together.
_FIXED = frozenset({"Attention", "BatchNormalization"})


def remove_unread(model: ir.Model) -> tuple[int, int]:
    """Remove dead nodes everywhere and unread optional outputs; returns how many of each."""
    outputs = nodes = 0
    # Inner graphs first: what they capture may be read by nobody else.
    for graph in (*reversed(list(model.graph.subgraphs())), model.graph):
        nodes += remove_dead(graph)
    version = opset(model)
    for node in model.graph.all_nodes():
        outputs += _drop_outputs(node, version)
    return nodes, outputs


def _drop_outputs(node: ir.Node, version: int) -> int:
    if len(node.outputs) < 2 or node.domain not in ("", "ai.onnx") or any(True for _ in subgraphs(node)):
        return 0
    optional = _optional_outputs(node.op_type, version)
    dropped = 0
    for value, free in zip(node.outputs, optional, strict=False):
        if free and value.name and not value.uses() and not value.is_graph_output():
            value.name = ""
            dropped += 1
    if dropped:
        count = len(node.outputs)
        while count > 1 and not node.outputs[count - 1].name:
            count -= 1
        node.resize_outputs(count)
    return dropped


@functools.lru_cache(maxsize=512)
def _optional_outputs(op_type: str, version: int) -> tuple[bool, ...]:
    """Which outputs the schema calls optional; none where the operator is unknown."""
    if op_type in _FIXED or not onnx.defs.has(op_type, version):
        return ()
    option = onnx.defs.OpSchema.FormalParameterOption.Optional
    return tuple(output.option == option for output in onnx.defs.get_schema(op_type, version).outputs)
