"""What storing would do: simulated in sessions that alone hold their weights."""

from __future__ import annotations

import weakref

import numpy as np
import onnx
import pytest

from onnxslim import model as model_io
from onnxslim.probe import Local, SwitchedWeights
from onnxslim.profiles import CPU
from onnxslim.quantization import dequantize, store_weight, weight_params


def test_a_simulation_holds_its_weights_once_and_leaves_those_of_the_model(proto: onnx.ModelProto) -> None:
    model = model_io.load(proto)
    before = model_io.to_bytes(model)
    x = np.random.default_rng(0).standard_normal((2, 2, 8, 8)).astype(np.float32)
    other = np.zeros(model.graph.initializers["w2"].shape.numpy(), np.float32)  # type: ignore[union-attr]
    changed = weakref.ref(other)
    switched = SwitchedWeights(model, {"w2": other}, threads=1)
    del other
    assert changed() is None
    plain, without = switched({"x": x}, ()), switched({"x": x}, ("w2",))
    assert not np.array_equal(plain[0], without[0])
    assert np.ptp(without[0], axis=0).max() == 0  # nothing but the bias is left
    assert model_io.to_bytes(model) == before


def test_the_error_of_a_product_is_told_for_each_range_and_each_is_computed_once() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((6, 5)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [8, 6])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [8, 5])],
        [onnx.numpy_helper.from_array(w, "w")],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = model_io.load(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10))
    x = rng.standard_normal((8, 6)).astype(np.float32)
    chosen = weight_params(w, 1)
    stored = store_weight(w, 1, chosen)
    ranges = {"wide": (-9.0, 9.0), "narrow": (-1.0, 1.0), "the same": (-9.0, 9.0)}
    options = {name: CPU.params(*limits) for name, limits in ranges.items()}
    local = Local(model, ["product"], {"product": (stored, chosen)}, {"x": options}, 1)
    assert len(local.runner.session.get_inputs()) == 1 + 2 * 2
    found = local({"x": x})["product"]
    exact = x.astype(np.float64) @ w
    for name, p in options.items():
        q = np.clip(np.rint(x / p.scale) + p.zero_point, 0, 255)
        error = (q - p.zero_point) * p.scale.astype(np.float64) @ dequantize(stored, chosen) - exact
        assert found[name][0] == pytest.approx(np.sum(error**2) / np.sum(exact**2), rel=1e-3)
        np.testing.assert_allclose(found[name][1], error.mean(0), atol=1e-5)
    assert found["wide"][0] == found["the same"][0] < found["narrow"][0]
