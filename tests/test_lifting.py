"""Functions and constants of any model move to the main graph, and the model stays valid and says the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.errors import ModelError
from onnxslim.graph import add_constant


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    proto = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)
    onnx.checker.check_model(proto)
    return proto


def _floats(name: str, shape: Sequence[int] | None = (2,)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@pytest.mark.parametrize("taken", [True, False])
def test_branches_that_use_the_same_names_keep_what_they_mean(taken: bool) -> None:
    two = helper.make_node("Constant", [], ["c"], value_float=2.0)
    other = helper.make_node("Constant", [], ["d"], value_float=2.0)
    then = [two, helper.make_node("Mul", ["x", "c"], ["y"])]
    orelse = [helper.make_node("Relu", ["x"], ["c"]), other, helper.make_node("Mul", ["c", "d"], ["y"])]
    bodies = {
        f"{name}_branch": helper.make_graph(nodes, name, [], [_floats("y")])
        for name, nodes in (("then", then), ("else", orelse))
    }
    inputs = [_floats("x"), helper.make_tensor_value_info("p", TensorProto.BOOL, [])]
    proto = _model([helper.make_node("If", ["p"], ["z"], **bodies)], inputs, [_floats("z")])
    lifted = model_io.to_proto(model_io.load(proto))
    onnx.checker.check_model(lifted)
    feed = {"x": np.array([-3, 4], np.float32), "p": np.array(taken)}
    assert len(lifted.graph.initializer) == 2
    assert np.array_equal(runtime.load(lifted.SerializeToString())(feed)["z"], [-6, 8] if taken else [0, 8])


def test_branches_with_weights_of_the_same_names_have_their_own() -> None:
    bodies = {}
    for k, name in enumerate(("then", "else")):
        nodes = [helper.make_node("Mul", ["x", "b"], ["a"]), helper.make_node("Add", ["a", "b_1"], ["y"])]
        weights = [onnx.numpy_helper.from_array(np.full(2, k + j, np.float32), n) for j, n in enumerate(("b", "b_1"))]
        bodies[f"{name}_branch"] = helper.make_graph(nodes, name, [], [_floats("y")], weights)
    inputs = [_floats("x"), helper.make_tensor_value_info("p", TensorProto.BOOL, [])]
    model = model_io.load(_model([helper.make_node("If", ["p"], ["z"], **bodies)], inputs, [_floats("z")]))
    for _ in range(3):  # names that are new to all of it
        add_constant(model.graph, "b", np.zeros(1, np.float32))
    onnx.checker.check_model(model_io.to_proto(model))
    for taken, want in ((True, [1, 1]), (False, [3, 3])):
        feed = {"x": np.ones(2, np.float32), "p": np.array(taken)}
        assert runtime.load(model)(feed)["z"].tolist() == want


def test_any_text_is_a_constant() -> None:
    nodes = [
        helper.make_node("Constant", [], ["animals"], value_strings=["猫", "犬"]),
        helper.make_node("Constant", [], ["one"], value_string="é"),
        helper.make_node("Gather", ["animals", "i"], ["y"]),
        helper.make_node("Identity", ["one"], ["z"]),
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.STRING, s) for n, s in (("y", [1]), ("z", []))]
    model = model_io.load(_model(nodes, [helper.make_tensor_value_info("i", TensorProto.INT64, [1])], outputs))
    got = runtime.load(model)({"i": np.array([1])})
    assert len(model.graph.initializers) == 2
    assert got["y"].tolist() == ["犬"] and got["z"].item() == "é"


def _calls(function: onnx.FunctionProto) -> onnx.ModelProto:
    node = helper.make_node(function.name, ["x"], ["y"], domain="mine")
    return _model([node], [_floats("x")], [_floats("y")], [function])


def test_a_function_may_import_another_version_that_means_the_same() -> None:
    nodes = [helper.make_node("Relu", ["a"], ["b"])]
    model = model_io.load(_calls(helper.make_function("mine", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 17)])))
    assert [node.op_type for node in model.graph] == ["Relu"]


def test_a_function_with_a_graph_for_an_attribute_is_refused() -> None:
    body = helper.make_graph([helper.make_node("Constant", [], ["w"], value_float=1.0)], "body", [], [_floats("w", ())])
    branch = onnx.AttributeProto(name="then_branch", ref_attr_name="body", type=onnx.AttributeProto.GRAPH)
    node = helper.make_node("If", ["p"], ["b"], else_branch=body)
    node.attribute.append(branch)
    nodes = [helper.make_node("Cast", ["a"], ["p"], to=TensorProto.BOOL), node]
    function = helper.make_function("mine", "F", ["a"], ["b"], nodes, [helper.make_opsetid("", 18)], ["body"])
    call = helper.make_node("F", ["x"], ["y"], domain="mine", body=body)
    graph = helper.make_graph([call], "g", [_floats("x", (1,))], [_floats("y", None)])
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    with pytest.raises(ModelError, match="cannot be inlined"):
        model_io.load(helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8))
