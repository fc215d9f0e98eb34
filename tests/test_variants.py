from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from onnxslim import model as model_io
from onnxslim import runtime, variants
from onnxslim.graph import set_constant

sys.path.insert(0, str(Path(__file__).parent))

from coupled_graphs import Builder

FEED = {"x": np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)}


@pytest.mark.parametrize("limit", [runtime.IN_MEMORY, 0])
def test_each_session_has_the_weights_of_its_moment(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(runtime, "IN_MEMORY", limit)
    b = Builder()
    y = b.op("MatMul", b.relu(b.op("MatMul", b.input("x", 2, 4), b.w(4, 5, name="a"))), b.w(5, 3, name="b"))
    model = model_io.load(b.proto(y))
    weights = model.graph.initializers
    first = runtime.load(model)(FEED)[y]
    kinds = variants.Variants(model)
    rng = np.random.default_rng(0)
    for names in (["a"], ["b"], ["a", "b"], []):
        for name in names:
            set_constant(weights[name], rng.standard_normal(weights[name].shape.numpy()).astype(np.float32))
        want = runtime.load(model)(FEED)[y]
        np.testing.assert_array_equal(kinds.load()(FEED)[y], want)
        assert bool(names) == bool(np.abs(want - first).max() > 1e-3)
        kinds.restore()
        np.testing.assert_array_equal(runtime.load(model)(FEED)[y], first)
