"""Recurrent layers that start from zeros do so without being told, whatever the zeros are computed by."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.contract import Context
from onnxslim.data import Data, input_specs
from onnxslim.passes.simplify import Simplify

HIDDEN, FEATURES = 5, 3
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
Nodes = list[onnx.NodeProto]
rng = np.random.default_rng(8)
X = rng.standard_normal((4, 2, FEATURES)).astype(np.float32)


def _ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def _filled(number: float) -> Nodes:
    """(1, batch, HIDDEN) as TorchScript makes it: filled, for two layers, and cut."""
    fill = numpy_helper.from_array(np.array([number], np.float32))
    return [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["batch"]),
        helper.make_node("Concat", ["two", "batch", "hidden"], ["sizes"], axis=0),
        helper.make_node("ConstantOfShape", ["sizes"], ["both"], value=fill),
        helper.make_node("Slice", ["both", "one", "two", "zero"], ["state"]),
    ]


def _expanded(number: float) -> Nodes:
    """(1, batch, HIDDEN) as tf2onnx makes it: a number expanded, and an axis put in front."""
    return [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "one"], ["batch"]),
        helper.make_node("Concat", ["batch", "hidden"], ["sizes"], axis=0),
        helper.make_node("Constant", [], ["number"], value=numpy_helper.from_array(np.float32(number))),
        helper.make_node("Expand", ["number", "sizes"], ["flat"]),
        helper.make_node("Unsqueeze", ["flat", "zero"], ["state"]),
    ]


def _stored(number: float) -> Nodes:
    """A constant; only its last element is ``number``."""
    array = np.zeros((1, 2, HIDDEN), np.float32)
    array[-1, -1, -1] = number
    return [helper.make_node("Constant", [], ["state"], value=numpy_helper.from_array(array))]


def _joined(number: float) -> Nodes:
    """Zeros beside something else."""
    halves = [np.zeros((1, 1, HIDDEN), np.float32), np.full((1, 1, HIDDEN), number, np.float32)]
    made = [
        helper.make_node("Constant", [], [f"half{k}"], value=numpy_helper.from_array(a)) for k, a in enumerate(halves)
    ]
    return [*made, helper.make_node("Concat", ["half0", "half1"], ["state"], axis=1)]


def _layer(kind: str, state: Nodes, states: int) -> onnx.ModelProto:
    """A recurrent layer all of whose outputs are read; ``states`` of its states are given."""
    gates = GATES[kind]
    weights = [
        numpy_helper.from_array(rng.standard_normal((1, gates * HIDDEN, n)).astype(np.float32), name)
        for name, n in (("w", FEATURES), ("r", HIDDEN))
    ]
    outputs = ["y", "h", "c"][: 3 if kind == "LSTM" else 2]
    node = helper.make_node(kind, ["x", "w", "r", "", "", *["state"] * states], outputs, hidden_size=HIDDEN)
    graph = helper.make_graph(
        [*state, node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["time", 2, FEATURES])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [*weights, _ints("zero", 0), _ints("one", 1), _ints("two", 2), _ints("hidden", HIDDEN)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    loaded = model_io.load(model)
    context = Context(Data("test", 1, lambda k: {"x": X}, input_specs(loaded)))
    Simplify().apply(loaded, context)
    return model_io.to_proto(loaded)


@pytest.mark.parametrize("state", [_filled, _expanded, _stored, _joined])
@pytest.mark.parametrize(("kind", "states"), [("LSTM", 2), ("LSTM", 1), ("GRU", 1), ("RNN", 1)])
def test_zeros_are_left_out_and_nothing_else(kind: str, states: int, state: Callable[[float], Nodes]) -> None:
    for number in (0.0, 0.5):
        model = _layer(kind, state(number), states)
        result = _simplified(model)
        (layer,) = [node for node in result.graph.node if node.op_type == kind]
        assert [bool(name) for name in layer.input[5:]] == [True] * (states if number else 0)
        assert number or len(result.graph.node) == 1
        want, got = (runtime.load(m.SerializeToString())({"x": X}) for m in (model, result))
        assert all(np.array_equal(want[name], got[name]) for name in want)


def test_a_state_that_is_given_stays() -> None:
    model = _layer("LSTM", [], 2)
    model.graph.input.append(helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 2, HIDDEN]))
    (layer,) = _simplified(model).graph.node
    assert list(layer.input[5:]) == ["state", "state"]


def test_one_state_is_left_out_beside_another() -> None:
    model = _layer("LSTM", _stored(0.0), 2)
    model.graph.input.append(helper.make_tensor_value_info("cell", TensorProto.FLOAT, [1, 2, HIDDEN]))
    model.graph.node[-1].input[6] = "cell"
    (layer,) = _simplified(model).graph.node
    assert list(layer.input[3:]) == ["", "", "", "cell"]
