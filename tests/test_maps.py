"""Models whose outputs are maps, as converters of scikit-learn write them: read, optimized, written as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxslim
from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.errors import ModelError

ML = "ai.onnx.ml"
X = np.random.default_rng(5).standard_normal((3, 4)).astype(np.float32)


def _maps() -> onnx.TypeProto:
    return helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    )


def classifier() -> onnx.ModelProto:
    """A linear classifier with something to simplify, whose second output maps each label to its probability."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Softmax", ["product"], ["scores"]),
        helper.make_node("Identity", ["scores"], ["same"]),
        helper.make_node("ArgMax", ["same"], ["label"], axis=1, keepdims=0),
        helper.make_node("ZipMap", ["same"], ["unused"], domain=ML, classlabels_int64s=[7, 8]),
        helper.make_node("ZipMap", ["same"], ["probabilities"], domain=ML, classlabels_int64s=[3, 5]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]),
            helper.make_value_info("probabilities", _maps()),
        ],
        [numpy_helper.from_array(np.random.default_rng(6).standard_normal((4, 2)).astype(np.float32), "w")],
        value_info=[helper.make_value_info("unused", _maps())],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(ML, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_the_passes_keep_the_type_and_what_is_in_it() -> None:
    source = classifier()
    content = source.SerializeToString()
    result = onnxslim.optimize(source)
    assert source.SerializeToString() == content, "the given message was changed"
    assert result.proto().graph.output == source.graph.output
    assert [node.op_type for node in result.proto().graph.node].count("ZipMap") == 1
    wanted, got = (runtime.load(m.SerializeToString())({"x": X}) for m in (source, result.proto()))
    assert np.array_equal(got["label"], wanted["label"])
    for one, other in zip(got["probabilities"], wanted["probabilities"], strict=True):
        assert one.keys() == other.keys() == {3, 5}
        assert np.allclose(list(one.values()), list(other.values()), rtol=1e-6)


@pytest.mark.parametrize("external", [False, True])
def test_a_file_says_the_type_again(tmp_path: Path, external: bool) -> None:
    model = model_io.load(classifier()).clone()
    path = model_io.save(model, tmp_path / "model.onnx", external=external)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    assert proto.graph.output == classifier().graph.output
    assert not proto.graph.value_info or all(v.name != "unused" for v in proto.graph.value_info)


def test_the_rest_of_the_graph_is_inferred() -> None:
    model = model_io.load(classifier())
    shapes = {value.name: value.shape for node in model.graph for value in node.outputs}
    assert shapes["same"] is not None
    assert shapes["same"][1] == 2


def test_an_input_that_is_a_map_is_refused() -> None:
    proto = classifier()
    proto.graph.input.append(helper.make_value_info("counts", _maps()))
    with pytest.raises(ModelError, match="input 'counts' is a map"):
        model_io.load(proto)
