"""A model with one layer of every kind that weights are found in, and its inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnxslim import data, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome, Pass

WIDTHS = {
    "stem_w": (144, 3, 4, 4), "conv_w": (32, 144, 1, 1), "matmul_w": (64, 96), "gemm_w": (80, 96),
    "lstm_w": (1, 128, 80), "lstm_r": (1, 128, 32),
}  # fmt: skip


def layered(opset: int = 17) -> onnx.ModelProto:
    """Two Conv, a MatMul, a Gemm with a transposed weight and an LSTM: ``x`` (n, 3, 8, 8) to ``y`` (n, 1, 1, 32)."""
    rng = np.random.default_rng(11)
    weights = {n: rng.standard_normal(s) / np.sqrt(np.prod(s[1:]) if len(s) == 4 else 80) for n, s in WIDTHS.items()}
    weights["matmul_w"] = rng.standard_normal((128, 96)) / np.sqrt(128)
    nodes = [
        helper.make_node("Conv", ["x", "stem_w"], ["s"], name="stem", strides=[4, 4]),
        helper.make_node("Relu", ["s"], ["sr"]),
        helper.make_node("Conv", ["sr", "conv_w"], ["c"], name="conv"),
        helper.make_node("Flatten", ["c"], ["f"]),
        helper.make_node("MatMul", ["f", "matmul_w"], ["m"], name="matmul"),
        helper.make_node("LeakyRelu", ["m"], ["mr"]),
        helper.make_node("Gemm", ["mr", "gemm_w"], ["g"], name="gemm", transB=1),
        helper.make_node("Unsqueeze", ["g", "one"], ["t"]),
        helper.make_node("LSTM", ["t", "lstm_w", "lstm_r"], ["y"], name="lstm", hidden_size=32, layout=0),
    ]
    constants = {n: a.astype(np.float32) for n, a in weights.items()} | {"one": np.array([1], np.int64)}
    graph = helper.make_graph(
        nodes,
        "layered",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def feeds(count: int = 8) -> list[dict[str, np.ndarray]]:
    """Inputs of few directions, as those of real layers are."""
    mix = np.random.default_rng(5).standard_normal((8, 3 * 8 * 8))
    draws = [np.random.default_rng(k).standard_normal((16, 8)) @ mix for k in range(count)]
    return [{"x": (d.reshape(-1, 3, 8, 8) / 3).astype(np.float32)} for d in draws]


def apply(proto: onnx.ModelProto, item: Pass, synthetic: bool = False) -> tuple[ir.Model, Outcome, list[str]]:
    """What ``item`` makes of ``proto`` with `feeds`, and the warnings."""
    model = model_io.load(proto)
    samples = data.open_data(feeds(), data.input_specs(model))
    ctx = Context(calibration=samples, synthetic=synthetic, threads=1)
    outcome = item.apply(model, ctx)
    onnx.checker.check_model(model_io.to_proto(model), full_check=True)
    return model, outcome, ctx.warnings


def gap(proto: onnx.ModelProto, model: ir.Model) -> float:
    """Relative L2 distance of the outputs on a sample that `apply` does not see."""
    one = runtime.load(proto.SerializeToString())(feeds(9)[-1])["y"]
    two = runtime.load(model)(feeds(9)[-1])["y"]
    return float(np.linalg.norm(one - two) / np.linalg.norm(one))
