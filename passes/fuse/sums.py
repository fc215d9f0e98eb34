"""What is added up in front of a LayerNormalization, as one Sum.

Bias, residual and data in one node instead of two. ONNX Runtime fuses an Add with the LayerNormalization behind it into
SkipLayerNormalization, whose CPU kernel (in version 1.32) takes as long as five of the vectorized LayerNormalization;
it does not do so with a Sum, which takes as long as the Adds. In older versions (1.20 to 1.23) all of them are alike.
Other providers gain from the fused kernel: for them the Adds stay.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.contract import Context
from onnxslim.passes.fuse.work import Work

# Sum broadcasts from here on.
BROADCASTS = 8


def merge_sums(work: Work, ctx: Context) -> None:
    """Turn the Adds that lead to a LayerNormalization into one Sum."""
    if ctx.target != "cpu" or g.opset(work.model) < BROADCASTS:
        return
    for node in work.nodes():
        x = node.inputs[0] if g.is_op(node, "LayerNormalization") else None
        add = x.producer() if x is not None else None
        if add is not None and g.is_op(add, "Add") and add.outputs[0].dtype is ir.DataType.FLOAT:
            _merge(work, add)


def _merge(work: Work, add: ir.Node) -> None:
    if any(v is None or g.is_constant(v) for v in add.inputs):
        return  # a bias alone
    shape = g.known_shape(add.outputs[0])
    # A matrix product and its bias are one Gemm for the runtime.
    terms = _terms(add, add) if shape is not None and len(shape) > 2 else list(add.inputs)
    inner = [v.producer() for v in add.inputs if v is not None]
    add.op_type = "Sum"
    add.resize_inputs(len(terms))
    for index, term in enumerate(terms):
        add.replace_input_with(index, term)
    g.remove_dead(work.model.graph, [node for node in inner if node is not None])
    work.done["Sum"] += 1


def _terms(node: ir.Node, root: ir.Node) -> list[ir.Value | None]:
    """The operands of ``node``, those of an Add that nothing else reads in its place."""
    terms: list[ir.Value | None] = []
    for value in node.inputs:
        producer = value.producer() if value is not None and g.only_user(value) is node else None
        if producer is not None and g.is_op(producer, "Add") and producer.graph is root.graph:
            terms += _terms(producer, root)
        else:
            terms.append(value)
    return terms
