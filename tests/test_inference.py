"""What shape inference writes, what it leaves alone, and when it is not asked."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxslim import inference

sys.path.insert(0, str(Path(__file__).parent))
from nets import net, node


def load(size: int | str = 3) -> ir.Model:
    weights = {"w": np.ones((4, 300), np.float32), "c": np.ones(300, np.float32), "s": np.array([-1, 2])}
    nodes = [node("MatMul", "x w", "m"), node("Add", "m c", "a"), node("Reshape", "a s", "y")]
    return ir.from_proto(net(nodes, {"x": (size, 4)}, weights, {"y": None}))


def shapes(model: ir.Model) -> dict[str, str]:
    return {str(v.name): str(v.shape) for n in model.graph for v in n.outputs}


def test_shapes_follow_from_inputs_weights_and_contents() -> None:
    model = load()
    inference.run(model)
    assert shapes(model) == {"m": "[3,300]", "a": "[3,300]", "y": "[450,2]"}
    assert all(v.dtype is ir.DataType.FLOAT for n in model.graph for v in n.outputs)


def test_the_model_around_the_shapes_stays() -> None:
    model = load()
    weights = {name: value.const_value for name, value in model.graph.initializers.items()}
    inference.run(model)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert list(weights) == list(model.graph.initializers)
    assert all(model.graph.initializers[name].const_value is tensor for name, tensor in weights.items())


@pytest.mark.parametrize(("size", "asked"), [(3, 1), ("n", 2)])
def test_nothing_is_asked_where_all_is_known(monkeypatch: pytest.MonkeyPatch, size: int | str, asked: int) -> None:
    calls = []
    infer = onnx.shape_inference.infer_shapes

    def counted(*args: object, **options: object) -> onnx.ModelProto:
        calls.append(args)
        return infer(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", counted)
    model = load(size)
    for _ in range(2):
        inference.run(model)
    assert len(calls) == asked
