"""What storing would do: simulated in sessions that alone hold their weights."""

from __future__ import annotations

import weakref

import numpy as np
import onnx

from onnxslim import model as model_io
from onnxslim.probe import SwitchedWeights


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
