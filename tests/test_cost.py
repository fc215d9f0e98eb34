"""MACs against counts by hand and against equal operators; parameters once each; shapes from samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim import cost, layers
from onnxslim import model as model_io

F = np.float32


def _model(
    op: str,
    inputs: dict[str, list[Any]],
    weights: dict[str, np.ndarray] | None = None,
    *,
    order: list[str] | None = None,
    domain: str = "",
    outputs: int = 1,
    opset: int = 17,
    **attributes: Any,
) -> Any:
    weights = weights or {}
    names = order or [*inputs, *weights]
    node = helper.make_node(op, names, [f"y{k}" for k in range(outputs)], domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return model_io.load(onnx.shape_inference.infer_shapes(proto))


def _w(*shape: int, dtype: Any = F) -> np.ndarray:
    return np.ones(shape, dtype)


CASES: dict[str, tuple[Any, int]] = {
    "conv": (_model("Conv", {"x": [1, 3, 8, 8]}, {"w": _w(5, 3, 3, 3)}, pads=[1] * 4), 8 * 8 * 5 * 27),
    "conv stride 2": (
        _model("Conv", {"x": [2, 3, 8, 8]}, {"w": _w(5, 3, 3, 3)}, strides=[2, 2], pads=[1] * 4),
        2 * 4 * 4 * 5 * 27,
    ),
    "depthwise": (_model("Conv", {"x": [1, 6, 8, 8]}, {"w": _w(6, 1, 3, 3)}, group=6, pads=[1] * 4), 8 * 8 * 6 * 9),
    "conv 1d": (_model("Conv", {"x": [1, 4, 10]}, {"w": _w(5, 4, 3)}), 8 * 5 * 12),
    "transposed": (
        _model("ConvTranspose", {"x": [1, 4, 5, 5]}, {"w": _w(4, 3, 2, 2)}, strides=[2, 2]),
        5 * 5 * 4 * 3 * 4,
    ),
    "gemm": (_model("Gemm", {"x": [7, 4]}, {"w": _w(4, 3), "b": _w(3)}), 7 * 4 * 3),
    "gemm transposed": (_model("Gemm", {"x": [4, 7]}, {"w": _w(3, 4)}, transA=1, transB=1), 7 * 4 * 3),
    "matmul": (_model("MatMul", {"a": [2, 5, 7, 4], "b": [5, 4, 3]}), 2 * 5 * 7 * 3 * 4),
    "vector": (_model("MatMul", {"a": [4], "b": [4, 3]}), 12),
    "dot": (_model("MatMul", {"a": [4], "b": [4]}), 4),
    "einsum": (_model("Einsum", {"a": [2, 7, 4], "b": [2, 4, 3]}, equation="bij,bjk->bik"), 2 * 7 * 4 * 3),
    "einsum dots": (
        _model("Einsum", {"a": [2, 5, 7, 4], "b": [4, 3]}, equation="...ij, jk -> ...ik"),
        2 * 5 * 7 * 4 * 3,
    ),
    "einsum sum": (_model("Einsum", {"a": [2, 7]}, equation="ij->i"), 0),
    "lstm": (
        _model("LSTM", {"x": [6, 2, 3]}, {"w": _w(1, 20, 3), "r": _w(1, 20, 5)}, hidden_size=5),
        6 * 2 * 4 * 5 * (3 + 5),
    ),
    "gru both ways": (
        _model(
            "GRU", {"x": [6, 2, 3]}, {"w": _w(2, 15, 3), "r": _w(2, 15, 5)}, hidden_size=5, direction="bidirectional"
        ),
        2 * 6 * 2 * 3 * 5 * (3 + 5),
    ),
    "rnn": (_model("RNN", {"x": [6, 2, 3]}, {"w": _w(1, 5, 3), "r": _w(1, 5, 5)}, hidden_size=5), 6 * 2 * 5 * 8),
    "attention": (
        _model("Attention", {"q": [2, 4, 6, 8], "k": [2, 4, 9, 8], "v": [2, 4, 9, 10]}, opset=23),
        2 * 4 * 6 * 9 * (8 + 10),
    ),
    "grouped attention": (
        _model(
            "Attention", {"q": [2, 6, 32], "k": [2, 9, 16], "v": [2, 9, 16]}, opset=23, q_num_heads=4, kv_num_heads=2
        ),
        2 * 4 * 6 * 9 * (8 + 8),
    ),
    "elementwise": (_model("Add", {"a": [2, 3], "b": [2, 3]}), 0),
    "own domain": (_model("Conv", {"x": [1, 3, 8, 8]}, {"w": _w(5, 3, 3, 3)}, domain="com.microsoft"), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_by_hand(name: str) -> None:
    model, macs = CASES[name]
    counted = cost.analyze(model)
    assert counted.macs == macs
    assert not counted.unknown


def test_attention_of_microsoft_needs_no_inferred_output() -> None:
    inputs = {"q": [2, 6, 32], "k": [2, 9, 32], "v": [2, 9, 32]}
    model = _model("MultiHeadAttention", inputs, domain="com.microsoft", num_heads=4)
    assert cost.analyze(model).macs == 2 * 6 * 9 * (32 + 32)


def test_a_transposed_convolution_costs_what_its_adjoint_does() -> None:
    adjoint = _model("Conv", {"x": [1, 3, 10, 10]}, {"w": _w(4, 3, 2, 2)}, strides=[2, 2])
    assert cost.analyze(adjoint).macs == cost.analyze(CASES["transposed"][0]).macs


def test_weights_count_once_and_shapes_not_at_all() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16},
            int64[2] shape = {-1, 4}, float[4] unused = {1, 2, 3, 4}> {
            a = MatMul(x, w)  b = MatMul(a, w)  y = Reshape(b, shape)
        }
    """)
    model = model_io.load(proto)
    counted = cost.analyze(model)
    assert counted.parameters == cost.parameters(model) == 16
    assert counted.macs == 2 * 16
    assert sum(row.macs for row in counted.table) == counted.macs
    assert [row.parameters for row in counted.table] == [16, 0, 0]
    assert counted.by_op() == {"MatMul": (2, 16, 32), "Reshape": (1, 0, 0)}


def test_scales_and_zero_points_are_no_parameters() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 2] x) => (float[1, 2] y)
        <int8[2, 2] w = {1, 2, 3, 4}, float[2] s = {1, 2}, int8[2] z = {0, 0}, int32[2] b = {5, 6}, float sb = {1}> {
            d = DequantizeLinear<axis = 1>(w, s, z)
            c = DequantizeLinear(b, sb)
            y = Gemm(x, d, c)
        }
    """)
    counted = cost.analyze(model_io.load(proto))
    assert counted.parameters == 4 + 2
    # They belong to the node that computes with them, not to those that decode them.
    assert [(row.op_type, row.parameters, row.bytes) for row in counted.table] == [
        ("DequantizeLinear", 0, 0), ("DequantizeLinear", 0, 0), ("Gemm", 6, 4 + 8),
    ]  # fmt: skip


def test_a_stored_weight_that_nothing_reads_still_counts() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g () => (float[2] y) <int8[2] w = {1, 2}, float s = {1}> { y = DequantizeLinear(w, s) }
    """)
    assert cost.parameters(model_io.load(proto)) == 2


def test_symbolic_dimensions_come_from_the_sample_else_one() -> None:
    model = _model("Conv", {"x": ["n", 3, "h", 8]}, {"w": _w(5, 3, 3, 3)}, pads=[1] * 4)
    assert cost.analyze(model).macs == 8 * 5 * 27
    assert cost.analyze(model, {"x": np.zeros((2, 3, 6, 8), F)}).macs == 2 * 6 * 8 * 5 * 27
    assert model.graph.inputs[0].shape[0] == "n", "the model keeps its symbols"


def test_shapes_known_only_at_run_time_are_read_off_a_run() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 12] x, int64[2] shape) => (float[a, b] y) {
            r = Reshape(x, shape)
            t = Transpose(r)
            y = MatMul(r, t)
        }
    """)
    model = model_io.load(proto)
    feed = {"x": np.zeros((2, 12), F), "shape": np.array([6, 4])}
    assert cost.analyze(model, feed).macs == 6 * 4 * 6
    unknown = cost.analyze(model)
    assert unknown.macs == 0
    assert len(unknown.unknown) == 1


def test_bodies() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[7, 4] x, float[4, 4] w, bool c) => (float[7, 4] y) {
            y = If (c) <then_branch = t () => (a) { p = MatMul(x, w)  a = MatMul(p, w) },
                        else_branch = e () => (b) { b = MatMul(x, w) }>
        }
    """)
    assert cost.analyze(model_io.load(proto)).macs == 2 * 7 * 16


def test_a_scan_body_runs_once_per_step() -> None:
    state = helper.make_tensor_value_info("s", TensorProto.FLOAT, [1, 4])
    row = helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 4])
    out = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("s2", "o")]
    nodes = [helper.make_node("MatMul", ["r", "w"], ["m"]), helper.make_node("Add", ["m", "s"], ["s2"])]
    body = helper.make_graph([*nodes, helper.make_node("Identity", ["s2"], ["o"])], "b", [state, row], out)
    graph = helper.make_graph(
        [helper.make_node("Scan", ["s0", "x"], ["last", "y"], body=body, num_scan_inputs=1)],
        "g",
        [helper.make_tensor_value_info("s0", TensorProto.FLOAT, [1, 4]),
         helper.make_tensor_value_info("x", TensorProto.FLOAT, [9, 1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [9, 1, 4])],
        [numpy_helper.from_array(_w(4, 4), "w")],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    counted = cost.analyze(model_io.load(proto))
    assert counted.macs == 9 * 16
    assert counted.parameters == 16


def test_a_scan_along_another_axis_has_its_steps() -> None:
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4, 10, 4] x, float[4, 4] w) => (float[10, 4, 4] y) {
            y = Scan <num_scan_inputs = 1, scan_input_axes = [1],
                body = b (float[4, 4] r) => (float[4, 4] o) { o = MatMul(r, w) }> (x)
        }"""
    assert cost.analyze(model_io.load(onnx.parser.parse_model(text))).macs == 10 * 64


def test_packed_weights_have_the_elements_that_they_stand_for() -> None:
    weights = {"w": _w(48, 3, 16, dtype=np.uint8), "s": _w(48, 3)}
    model = _model("MatMulNBits", {"x": [1, 96]}, weights, domain="com.microsoft", K=96, N=48, bits=4, block_size=32)
    model.graph.outputs[0].shape = ir.Shape([1, 48])
    counted = cost.analyze(model)
    assert (counted.parameters, counted.macs) == (48 * 96, 48 * 96)
    (layer,) = layers.find(model).values()
    assert layers.stored_bits(layer) == 4


def test_grouped_queries_attend_to_what_was_there_before() -> None:
    inputs: dict[str, list[Any]] = {"q": [2, 6, 32], "k": [2, 6, 16], "v": [2, 6, 16]}
    inputs |= {"pk": [2, 2, 5, 8], "pv": [2, 2, 5, 8]}
    options = {"domain": "com.microsoft", "num_heads": 4, "kv_num_heads": 2}
    model = _model("GroupQueryAttention", inputs, {"l": _w(2, dtype=np.int32), "t": _w(1, dtype=np.int32)}, **options)
    model.graph.outputs[0].shape = ir.Shape([2, 6, 32])
    assert cost.analyze(model).macs == 2 * 6 * (5 + 6) * (32 + 32)


def test_what_only_a_body_reads_ends_with_it() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[1000] x, bool c) => (float[1000] y) {
            r = Relu(x)
            a = If (c) <then_branch = t () => (float[1000] p) { p = Neg(r) },
                        else_branch = e () => (float[1000] q) { q = Abs(r) }>
            b = Neg(a)
            y = Exp(b)
        }
    """)
    assert cost.analyze(model_io.load(proto)).activations == 2 * 4000 + 1


def test_the_demo_model(cnn: dict[str, str]) -> None:
    model = model_io.load(cnn["model"])
    counted = cost.analyze(model)
    proto = onnx.load(cnn["model"])
    used = {name for node in proto.graph.node for name in node.input}
    floats = [t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT and t.name in used]
    assert counted.parameters == sum(math.prod(t.dims) for t in floats)
    assert counted.bytes == model_io.weight_bytes(model)
    double = cost.analyze(model, {"image": np.zeros((2, 1, 28, 28), F)})
    assert double.macs == 2 * counted.macs > 0


def test_work_counts_what_is_computed_as_well_as_products() -> None:
    model = CASES["conv"][0]
    counted = cost.analyze(model)
    assert counted.work == counted.macs + cost.ELEMENT * 5 * 8 * 8


def test_a_shape_without_a_type_is_not_told_to_the_user(caplog: pytest.LogCaptureFixture) -> None:
    """Behind an operator that nobody knows nothing has a type, and shapes follow from constants all the same."""
    graph = helper.make_graph(
        [
            helper.make_node("Unknown", ["x"], ["a"], domain="other"),
            helper.make_node("Reshape", ["a", "form"], ["b"]),
            helper.make_node("MatMul", ["b", "w"], ["y"]),
            helper.make_node("NonZero", ["x"], ["places"]),
            helper.make_node("Cast", ["places"], ["open"], to=TensorProto.FLOAT),
            helper.make_node("MatMul", ["x2", "open"], ["z"], name="open"),
        ],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", [2, 3]), ("x2", [1, 2]))],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "yz"],
        [numpy_helper.from_array(np.array([2, 3]), "form"), numpy_helper.from_array(_w(3, 4), "w")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("other", 1)]
    model = model_io.load(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    counted = cost.analyze(model)
    assert counted.macs == 2 * 3 * 4
    assert counted.unknown == ("open",)
    assert not caplog.records
