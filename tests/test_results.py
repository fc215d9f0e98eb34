"""`results`: which numbers of an output are of one kind."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.results import Kinds

X = {"x": np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)}


def _model(nodes: list[onnx.NodeProto], version: int = 13) -> onnx.ModelProto:
    sizes = onnx.numpy_helper.from_array(np.array([2, -1], np.int64), "sizes")
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", ends, outputs, [sizes])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", version)], ir_version=8)


def _split(proto: onnx.ModelProto) -> tuple[np.ndarray, list[np.ndarray]]:
    model = model_io.load(proto)
    outputs = runtime.arrays(runtime.run(runtime.load(model, threads=1), X))
    return outputs[0], Kinds(model, threads=1).split(X)(outputs)


BOXES, SCORES = helper.make_node("Neg", ["x"], ["boxes"]), helper.make_node("Sigmoid", ["x"], ["scores"])


@pytest.mark.parametrize(
    "behind",
    [
        [helper.make_node("Concat", ["boxes", "scores"], ["y"], axis=1)],
        [
            helper.make_node("Transpose", ["scores"], ["t"], perm=[0, 2, 1]),
            helper.make_node("Transpose", ["t"], ["u"], perm=[0, 2, 1]),
            helper.make_node("Concat", ["boxes", "u"], ["c"], axis=2),
            helper.make_node("Concat", ["c", "c"], ["d"], axis=1),
            helper.make_node("Reshape", ["d", "sizes"], ["y"]),
        ],
    ],
)
def test_boxes_and_scores_are_told_apart(behind: list[onnx.NodeProto]) -> None:
    whole, kinds = _split(_model([BOXES, SCORES, *behind]))
    boxes, scores = -X["x"], 1 / (1 + np.exp(-X["x"]))
    assert len(kinds) == 2
    repeats = whole.size // (2 * X["x"].size)
    for wanted in (boxes, scores):
        every = np.sort(np.tile(wanted.ravel(), repeats))
        assert any(np.allclose(np.sort(kind), every, atol=1e-6) for kind in kinds)


@pytest.mark.parametrize(
    "nodes",
    [
        [SCORES, helper.make_node("Identity", ["scores"], ["y"])],
        [SCORES, helper.make_node("Concat", ["scores", "scores"], ["y"], axis=1)],
        [BOXES, SCORES, helper.make_node("Add", ["boxes", "scores"], ["y"])],
    ],
)
def test_numbers_of_one_kind_are_not_split(nodes: list[onnx.NodeProto]) -> None:
    assert _split(_model(nodes))[1] == []


def test_what_has_another_shape_is_not_split() -> None:
    model = model_io.load(_model([BOXES, SCORES, helper.make_node("Concat", ["boxes", "scores"], ["y"], axis=1)]))
    assert Kinds(model, threads=1).split(X)([np.zeros((2, 5, 4), np.float32)]) == []
