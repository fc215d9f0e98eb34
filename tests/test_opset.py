"""`raise_opset`: the raised model computes what ONNX Runtime computed with the old one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.graph import opset
from onnxslim.opset import raise_opset

X = np.random.default_rng(0).standard_normal((2, 3, 4, 6)).astype(np.float32)


def _model(
    op: str,
    version: int,
    constants: dict[str, np.ndarray] | None = None,
    *,
    x: np.ndarray = X,
    symbolic: bool = False,
    kind: int = TensorProto.FLOAT,
    outputs: int = 1,
    inputs: list[str] | None = None,
    **attributes: Any,
) -> ir.Model:
    constants = constants or {}
    names = ["y"] + [f"y{k}" for k in range(1, outputs)]
    node = helper.make_node(op, inputs or ["x", *constants], names, **attributes)
    shape = [f"d{k}" for k in range(x.ndim)] if symbolic else list(x.shape)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(n, kind, None) for n in names],
        [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=7)
    proto.producer_name = "somebody"
    helper.set_model_props(proto, {"character": "a\nb"})
    # The checker wants a rank for every output.
    proto = onnx.shape_inference.infer_shapes(proto)
    return model_io.load(proto)


def _i(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CASES: dict[str, ir.Model] = {
    "squeeze-11": _model("Squeeze", 11, axes=[0], x=X[:1]),
    "squeeze-no-axes-11": _model("Squeeze", 11, x=X[:1]),
    "unsqueeze-11": _model("Unsqueeze", 11, axes=[0, -1]),
    "unsqueeze-7": _model("Unsqueeze", 7, axes=[0, 3]),
    "reduce-sum-11": _model("ReduceSum", 11, axes=[1, -1], keepdims=0),
    "reduce-sum-all-12": _model("ReduceSum", 12),
    "reduce-mean-11": _model("ReduceMean", 11, axes=[-1]),
    "split-11": _model("Split", 11, axis=1, split=[1, 2], outputs=2),
    "split-even-12": _model("Split", 12, axis=2, outputs=2),
    "clip-7": _model("Clip", 7, min=-0.5, max=1.0),
    "clip-low-10": _model("Clip", 10, min=0.0),
    "clip-none-10": _model("Clip", 10),
    "clip-12": _model("Clip", 12, {"low": np.float32(-0.5)}),
    "pad-10": _model("Pad", 10, pads=[0, 0, 1, 0, 0, 0, 2, 1], value=1.5),
    "pad-reflect-7": _model("Pad", 7, pads=[0, 0, 1, 2, 0, 0, 1, 0], mode="reflect"),
    "slice-9": _model("Slice", 9, starts=[1, -3], ends=[2, 1000], axes=[1, 3]),
    "slice-no-axes-7": _model("Slice", 7, starts=[0, 1], ends=[2, 3]),
    "slice-10": _model("Slice", 10, {"s": _i(5), "e": _i(0), "a": _i(3), "p": _i(-2)}),
    "dropout-7": _model("Dropout", 7, ratio=0.3),
    "dropout-10": _model("Dropout", 10, ratio=0.3),
    "dropout-12": _model("Dropout", 12, {"ratio": np.float32(0.3)}),
    "dropout-12-mode": _model("Dropout", 12, {"ratio": np.float32(0.3), "training": np.array(False)}),
    "softmax-default-11": _model("Softmax", 11),
    "softmax-default-dynamic-7": _model("Softmax", 7, symbolic=True),
    "softmax-axis2-11": _model("Softmax", 11, axis=2, symbolic=True),
    "softmax-last-12": _model("Softmax", 12, axis=-1, symbolic=True),
    "softmax-matrix-9": _model("Softmax", 9, x=X[:, 0, 0], symbolic=True),
    "softmax-ones-11": _model("Softmax", 11, x=X[:, :, :1, :1]),
    "logsoftmax-10": _model("LogSoftmax", 10, axis=1),
    "hardmax-11": _model("Hardmax", 11, axis=2),
    "batchnorm-8": _model(
        "BatchNormalization", 8, {n: np.abs(X[0, :, 0, k]) + 0.5 for k, n in enumerate("sbmv")}, spatial=1
    ),
    "upsample-8": _model("Upsample", 8, scales=[1.0, 1.0, 2.0, 1.5], mode="nearest"),
    "upsample-9": _model("Upsample", 9, {"scales": np.array([1, 1, 2, 3], np.float32)}, mode="nearest"),
    "upsample-linear-9": _model("Upsample", 9, {"scales": np.array([1, 1, 2, 3], np.float32)}, mode="linear"),
    "resize-nearest-10": _model("Resize", 10, {"scales": np.array([1, 1, 1.7, 2.3], np.float32)}, mode="nearest"),
    "resize-shrink-10": _model("Resize", 10, {"scales": np.array([1, 1, 0.6, 0.5], np.float32)}, mode="nearest"),
    "resize-linear-10": _model("Resize", 10, {"scales": np.array([1, 1, 0.5, 2.5], np.float32)}, mode="linear"),
    "resize-11": _model(
        "Resize",
        11,
        {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)},
        coordinate_transformation_mode="half_pixel",
        mode="linear",
    ),
    "scatter-9": _model("Scatter", 9, {"i": np.zeros((2, 3, 4, 1), np.int64), "u": X[..., :1]}, axis=3),
    "maxpool-7": _model("MaxPool", 7, kernel_shape=[2, 2]),
    "argmax-7": _model("ArgMax", 7, axis=1, kind=TensorProto.INT64),
    "gemm-7": _model("Gemm", 7, {"w": X[0, 0].T.copy(), "b": X[0, 0, 0, :4].copy()}, x=X[0, 1]),
    "quantize-10": _model("QuantizeLinear", 10, {"s": np.float32(0.1), "z": np.uint8(9)}, kind=TensorProto.UINT8),
}


def _outputs(model: ir.Model) -> list[Any]:
    value = model.graph.inputs[0]
    shape = [d if isinstance(d, int) else X.shape[k] for k, d in enumerate(value.shape or ())]
    feed = np.ascontiguousarray(X.reshape(-1)[: int(np.prod(shape))].reshape(shape))
    return list(runtime.load(model, optimize=False)({"x": feed}).values())


@pytest.mark.parametrize("name", CASES)
def test_same_outputs(name: str) -> None:
    model = CASES[name].clone()
    before = _outputs(model)
    assert raise_opset(model) is None
    assert opset(model) == 13
    onnx.checker.check_model(model_io.to_proto(model))
    for a, b in zip(before, _outputs(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.producer_name == "somebody"
    assert model.metadata_props["character"] == "a\nb"


NEWER: dict[str, ir.Model] = {
    **{
        name: _model(name, 13, axes=[1, -1], keepdims=0)
        for name in ("ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd")
    },
    "reduce-all": _model("ReduceMean", 17),
    "reduce-12": _model("ReduceSumSquare", 12, axes=[2]),
    "reduce-log": _model("ReduceLogSum", 13, axes=[0], x=np.abs(X) + 1),
    "split-even": _model("Split", 13, axis=1, outputs=3),
    "split-even-11": _model("Split", 11, axis=1, outputs=3),
    "split": _model("Split", 13, {"sizes": _i(1, 2)}, axis=1, outputs=2),
    "grid-sample": _model("GridSample", 16, {"grid": np.tanh(X[:, :2, :2, :2])}),
    "grid-sample-cubic": _model("GridSample", 16, {"grid": np.tanh(X[:, :2, :2, :2])}, mode="bicubic"),
    "grid-sample-nearest": _model("GridSample", 17, {"grid": np.tanh(X[:, :2, :2, :2])}, mode="nearest"),
    "roi-align": _model(
        "RoiAlign", 10, {"rois": np.float32([[0, 0, 2, 3], [0.4, 1, 3, 3]]), "which": _i(0, 1)}, output_height=2
    ),
    "dft": _model("DFT", 17, x=X[..., :1].copy()),
    "dft-axis": _model("DFT", 17, x=X[..., :1].copy(), axis=2, onesided=1),
    "pad": _model("Pad", 13, {"pads": _i(0, 0, 1, 0, 0, 0, 2, 1)}),
    "softmax": _model("Softmax", 11, axis=2, symbolic=True),
    "average-pool": _model("AveragePool", 11, kernel_shape=[2, 3], pads=[1, 1, 0, 1]),
    "resize": _model(
        "Resize", 13, {"roi": np.zeros(0, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}, mode="linear"
    ),
    "shape": _model("Shape", 12, kind=TensorProto.INT64),
    "scatter": _model("ScatterElements", 13, {"i": np.zeros((2, 3, 4, 1), np.int64), "u": X[..., :1]}, axis=3),
}


@pytest.mark.parametrize("name", NEWER)
@pytest.mark.parametrize("version", [17, 20, 21])
def test_same_outputs_in_newer_versions(name: str, version: int) -> None:
    model = NEWER[name].clone()
    before = _outputs(model)
    assert raise_opset(model, version) is None
    assert opset(model) == version
    onnx.checker.check_model(model_io.to_proto(model))
    for a, b in zip(before, _outputs(model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)  # pools add up in another order


def test_versions_that_nobody_knows_are_refused() -> None:
    assert "only 7 to 21" in str(raise_opset(_model("Relu", 13), 22))


@pytest.mark.parametrize("version", [8, 10])
def test_topk(version: int) -> None:
    attributes = {"k": 2} if version < 10 else {}
    node = helper.make_node("TopK", ["x", "k"] if version >= 10 else ["x"], ["v", "i"], axis=1, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)],
        [helper.make_tensor_value_info(n, t, [2, 2, 4, 6]) for n, t in (("v", 1), ("i", 7))],
        [onnx.numpy_helper.from_array(_i(2), "k")] if version >= 10 else [],
    )
    model = model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=7))
    before = _outputs(model)
    assert raise_opset(model) is None
    for a, b in zip(before, _outputs(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inside_subgraphs() -> None:
    branch = [
        helper.make_graph(
            [helper.make_node("Unsqueeze", ["x"], [f"b{k}"], axes=[k])],
            f"branch{k}",
            [],
            [helper.make_tensor_value_info(f"b{k}", TensorProto.FLOAT, ["p", "q"])],
        )
        for k in (0, 1)
    ]
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=branch[0], else_branch=branch[1])],
        "g",
        [helper.make_tensor_value_info("x", 1, [3]), helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["p", "q"])],
    )
    model = model_io.load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7))
    assert raise_opset(model) is None
    runner = runtime.load(model)
    x = np.arange(3, dtype=np.float32)
    assert runner({"x": x, "c": np.array(True)})["y"].shape == (1, 3)
    assert runner({"x": x, "c": np.array(False)})["y"].shape == (3, 1)


def test_keeps_a_newer_opset() -> None:
    model = _model("Softmax", 17, axis=1)
    assert raise_opset(model) is None
    assert opset(model) == 17


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (_model("Relu", 6), "opset 6"),
        (_model("Resize", 10, {"scales": np.array([1, 1, 0.5, 2], np.float32)}, mode="nearest"), "shrinks"),
        (_model("Upsample", 7, scales=[1.0, 1.0, 0.5, 2.0]), "shrinks"),
    ],
)
def test_refuses_and_leaves_the_model_alone(model: ir.Model, word: str) -> None:
    before = model_io.to_bytes(model)
    reason = raise_opset(model)
    assert reason is not None
    assert word in reason
    assert model_io.to_bytes(model) == before
