"""What exporters do that know the package OnnxSlim: they call ``onnxslim.slim`` on a message or a file."""

from __future__ import annotations

import onnx

import onnxslim

model = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, 4] x) => (float[batch, 4] y) {
        two = Constant<value_float = 2.0>()
        same = Identity(x)
        y = Mul(same, two)
    }""")
slimmed = onnxslim.slim(model)
assert slimmed is not None
onnx.checker.check_model(slimmed)
onnx.save(slimmed, "slim.onnx")
print([node.op_type for node in slimmed.graph.node])
