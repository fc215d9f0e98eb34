"""Products whose weights are stored in 8 bits and whose inputs are, at every inference, with the range they then have.

A MatMul or Gemm becomes DynamicQuantizeLinear, MatMulInteger, Cast, Mul and Add, which ONNX Runtime merges into one
DynamicQuantizeMatMul; inputs that several products read are quantized once. An LSTM becomes DynamicQuantizeLSTM.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.quantization import QParams, store_weight, weight_params

MICROSOFT = "com.microsoft"


def unsuitable(node: ir.Node) -> str | None:
    """Why a product cannot be quantized dynamically, or None."""
    if g.is_op(node, "LSTM"):
        weights = [g.is_constant(v) and v is not None and v.dtype == ir.DataType.FLOAT for v in node.inputs[1:3]]
        if not all(weights):
            return "its weights are not float32 constants"
        if g.attribute(node, "layout", 0) or g.attribute(node, "input_forget", 0):
            return "no kernel for an LSTM with layout or input_forget"
        return None
    if not g.is_op(node, "MatMul", "Gemm"):
        return f"{node.op_type} has no dynamic kernel that is faster than float"
    left, weight = node.inputs[0], node.inputs[1]
    if not g.is_constant(weight) or weight is None or g.is_constant(left) or left is None:
        return "it does not multiply an activation with a constant"
    if weight.dtype != ir.DataType.FLOAT or len(weight.shape or ()) != 2:
        return "its weight is not a float32 matrix"
    if g.is_op(node, "Gemm"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        scaled = g.attribute(node, "alpha", 1.0) != 1 or (bias is not None and g.attribute(node, "beta", 1.0) != 1)
        if scaled or g.attribute(node, "transA", 0):
            return "Gemm with alpha, beta or transA has no integer kernel"
    return None


def insert(model: ir.Model, names: Collection[str], *, portable: bool = False) -> None:
    """Quantize the products called ``names`` in place; opset 11 or newer, nodes with names of their own.

    ``portable``: no sum of two products leaves 16 bits, where x86 CPUs without VNNI keep it.
    """
    inputs: dict[ir.Value, ir.Node] = {}
    for node in list(model.graph.all_nodes()):
        if node.name in names:
            if g.is_op(node, "LSTM"):
                _lstm(model, node, portable)
            else:
                _product(model, node, inputs, portable)
    g.remove_dead(model.graph)


def _product(model: ir.Model, node: ir.Node, inputs: dict[ir.Value, ir.Node], portable: bool) -> None:
    graph, source, weight = model.graph, node.inputs[0], node.inputs[1]
    array = g.constant(weight)
    assert source is not None and weight is not None and array is not None
    if g.attribute(node, "transB", 0):
        array = array.T
    integers, params = _stored(array, portable)
    name = weight.name or ""
    stored = g.add_constant(graph, f"{name}_quantized", np.ascontiguousarray(integers))
    scale = g.add_constant(graph, f"{name}_scale", params.scale)
    zero = g.add_constant(graph, f"{name}_zero_point", params.zero_point)
    # The same input is quantized once, where it is known before any of its readers: in the graph that holds it.
    quantized = inputs.get(source)
    if quantized is None or quantized.graph is not node.graph:
        quantized = g.add_node(graph, "DynamicQuantizeLinear", [source], before=node, outputs=3, hint=source.name or "")
        for value, kind in zip(
            quantized.outputs, (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8), strict=True
        ):
            value.type = ir.TensorType(kind)
        inputs[source] = quantized
    name, node.name = node.name or "", g.fresh_name(graph, f"{node.name}_float")
    operands = [quantized.outputs[0], stored, quantized.outputs[2], zero]
    product = g.add_node(graph, "MatMulInteger", operands, before=node, hint=name)
    product.name = name
    product.outputs[0].type, product.outputs[0].shape = ir.TensorType(ir.DataType.INT32), node.outputs[0].shape
    real = g.add_node(
        graph, "Cast", product.outputs, before=node, attributes={"to": int(ir.DataType.FLOAT)}, hint=name,
        like=node.outputs[0],
    )  # fmt: skip
    step = g.add_node(graph, "Mul", [quantized.outputs[1], scale], before=node, hint=f"{name}_step")
    step.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    end = g.add_node(graph, "Mul", [real.outputs[0], step.outputs[0]], before=node, hint=name, like=node.outputs[0])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        end = g.add_node(graph, "Add", [end.outputs[0], bias], before=node, hint=name, like=node.outputs[0])
    _take_over(node, end)


def _lstm(model: ir.Model, node: ir.Node, portable: bool) -> None:
    graph = model.graph
    extra: list[ir.Value] = []
    stored: list[ir.Value] = []
    for value in node.inputs[1:3]:
        array = g.constant(value)
        assert value is not None and array is not None
        turned = array.transpose(0, 2, 1)  # (directions, inputs, 4 * hidden)
        integers, params = zip(*(_stored(matrix, portable) for matrix in turned), strict=True)
        stored.append(g.add_constant(graph, f"{value.name}_quantized", np.stack(integers)))
        scales, zeros = (np.stack([getattr(p, kind) for p in params]) for kind in ("scale", "zero_point"))
        extra.append(g.add_constant(graph, f"{value.name}_scale", scales))
        extra.append(g.add_constant(graph, f"{value.name}_zero_point", zeros))
    rest = [*node.inputs[3:], *([None] * 8)][:5]
    name, node.name = node.name or "", g.fresh_name(graph, f"{node.name}_float")
    model.graph.opset_imports[MICROSOFT] = 1
    inputs = [node.inputs[0], *stored, *rest, *extra]
    outputs = len(node.outputs)
    lstm = g.add_node(graph, "DynamicQuantizeLSTM", inputs, before=node, outputs=outputs, hint=name, domain=MICROSOFT)
    lstm.name = name
    lstm.attributes.update({k: a for k, a in node.attributes.items() if k not in ("layout",)})
    _take_over(node, lstm)


def _stored(matrix: np.ndarray, portable: bool) -> tuple[np.ndarray, QParams]:
    """``matrix`` (inputs, outputs) in int8, with one scale per column."""
    pairs = np.arange(len(matrix) // 2 * 2).reshape(-1, 2) if portable else None
    params = weight_params(matrix, 1, pairs=pairs)
    return store_weight(matrix, 1, params, pairs), params


def _take_over(node: ir.Node, other: ir.Node) -> None:
    """Let everybody read the outputs of ``other`` instead of those of ``node``, by the same names."""
    for old, new in zip(node.outputs, other.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        if old.name:
            name = old.name
            g.replace(old, new)
            if new.name != name:
                old.name, new.name = new.name, name
        else:
            new.name = ""
