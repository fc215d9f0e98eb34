"""`results`: what tells how far outputs are from the exact ones, and which numbers of an output are of one kind."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.noise import Gap, gaps
from onnxslim.results import KIND, Kinds, Told, telling

sys.path.insert(0, str(Path(__file__).parent))
from nets import net, node, normal

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


def _branch() -> onnx.NodeProto:
    """The label of r, chosen in the branch of an If."""
    bodies = []
    for axis in (0, 1):
        body = helper.make_graph(
            [node("ArgMax", "r", f"label{axis}", axis=axis, keepdims=0)],
            f"axis{axis}",
            [],
            [helper.make_tensor_value_info(f"label{axis}", TensorProto.INT64, None)],
        )
        bodies.append(body)
    return node("If", "yes", "y", then_branch=bodies[0], else_branch=bodies[1])


def _loaded(nodes: list[onnx.NodeProto], shape: list[int], weights: dict[str, np.ndarray], outputs: str) -> ir.Model:
    """The types of ``outputs`` are inferred."""
    proto = net(nodes, {"x": shape}, weights, [])
    kinds = {info.name: info for info in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    proto.graph.output.extend(kinds[name] for name in outputs.split())
    return model_io.load(proto)


MATMUL, RELU = node("MatMul", "x w", "h"), node("Relu", "h", "r")
TOP = node("TopK", "r two", "best where", axis=1)
WEIGHTS = {
    "w": normal(6, 6),
    "two": np.array([2], np.int64),
    "yes": np.array(True),
    "half": np.float32(0.5),
    "six": np.array([2, 3], np.int64),
}


@pytest.mark.parametrize(
    ("behind", "outputs", "told"),
    [
        ([], "r", "r"),
        ([node("ArgMax", "r", "y", axis=1)], "y", "r"),
        ([node("ArgMax", "r", "label", axis=1), node("Cast", "label", "y", to=TensorProto.FLOAT)], "y", "r"),
        ([node("ArgMax", "r", "y", axis=1)], "r y", "r"),
        ([node("ArgMax", "r", "y", axis=1)], "h y", "h r"),
        ([node("Greater", "r half", "y")], "y", "r"),
        ([TOP], "best where", "r"),
        ([TOP, node("Softmax", "best", "y", axis=1)], "y where", "r"),
        ([TOP, node("GatherElements", "h where", "y", axis=1)], "y", "h r"),
        ([TOP, node("MatMul", "best w2", "y")], "y", "y"),
        ([TOP, node("MatMul", "best w2", "s"), node("ArgMax", "s", "y", axis=1)], "y", "s"),
        ([node("Shape", "r", "y")], "y", "y"),
        ([node("Relu", "r", "z"), node("Shape", "r", "y")], "z y", "z y"),
        ([_branch()], "y", "r"),
        ([node("Identity", "x", "y")], "y", "y"),
        ([node("ArgMax", "x", "place", axis=1), node("GatherElements", "r place", "y", axis=1)], "y", "y"),
    ],
)
def test_choices_are_judged_by_what_they_are_made_by(behind: list[onnx.NodeProto], outputs: str, told: str) -> None:
    model = _loaded([MATMUL, RELU, *behind], [2, 6], WEIGHTS | {"w2": normal(2, 4)}, outputs)
    seen = Told(model, threads=1).model
    names = [output.name for output in seen.graph.outputs]
    assert sorted(names) == sorted(told.split())
    assert (seen is model) == (told == outputs)
    assert telling(model) == set(told.split()) & set(outputs.split())
    feed = {"x": normal(2, 6)}
    whole = runtime.run(runtime.load(model, threads=1), feed)
    other = runtime.run(runtime.load(seen, threads=1), feed)
    assert list(other) == names
    for name in set(whole) & set(other):
        np.testing.assert_allclose(whole[name], other[name], rtol=1e-5)


def test_boxes_and_scores_are_judged_and_not_those_that_are_selected() -> None:
    nodes = [
        MATMUL,
        node("Slice", "h zero four one", "boxes"),
        node("Sigmoid", "h", "scores"),
        node("Reshape", "boxes form", "each"),
        node("Reshape", "scores row", "rows"),
        node("NonMaxSuppression", "each rows most", "kept"),
        node("Gather", "kept two", "places", axis=1),
        node("Reshape", "places flat", "list"),
        node("Gather", "each list", "found", axis=1),
    ]
    numbers = {"zero": [0], "four": [4], "one": [1], "form": [1, -1, 4], "row": [1, 1, -1], "most": [3], "flat": [-1]}
    weights = WEIGHTS | {name: np.array(array, np.int64) for name, array in numbers.items()}
    told = Told(_loaded(nodes, [8, 6], weights, "found kept"), threads=1)
    assert sorted(output.name for output in told.model.graph.outputs) == ["each", "rows"]
    arrays = [normal(50) for _ in range(2)]
    (gap, other), whole = told.exact({"x": normal(8, 6)}, arrays).gaps([a * 0.9 for a in arrays]), _gap(arrays[0])
    assert gap is not None
    assert other is not None
    assert gap.error == pytest.approx(whole.error / KIND)
    assert other.signal == pytest.approx(_gap(arrays[1]).signal)


def _gap(array: np.ndarray) -> Gap:
    (found,) = gaps([array], [array * 0.9])
    assert found is not None
    return found
