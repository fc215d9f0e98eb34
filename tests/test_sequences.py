"""Models with sequences: inference keeps them apart from tensors, and every pass judges the arrays in them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

import onnxslim
from onnxslim import model as model_io

sys.path.insert(0, str(Path(__file__).parent))
from nets import net, node, normal

WEIGHTS = {"w1": normal(64, 128) / 8, "w2": normal(128, 64) / 8}
CALIBRATION = {"x": normal(8, 64)}
PASSES = [
    "int8(measure=false)",
    "dynamic_int8(measure=false)",
    "int4",
    "fp16",
    "fp16(keep_io=false)",
    "sparsify",
    "sparsify(ratio=0.3)",
    "cluster",
    "prune(ratio=0.3)",
]


def _split() -> onnx.ModelProto:
    """A matrix product is split into a sequence, one part of which is multiplied again."""
    nodes = [
        node("MatMul", "x w1", "a"),
        node("SplitToSequence", "a sizes", "parts", axis=1),
        node("Identity", "parts", "same"),
        node("SequenceAt", "same first", "part"),
        node("MatMul", "part w2", "y"),
    ]
    weights = WEIGHTS | {"w2": WEIGHTS["w2"][:64], "sizes": np.array([64, 64]), "first": np.array(0)}
    return net(nodes, {"x": ["N", 64]}, weights, {"y": ["N", 64]})


def _given() -> onnx.ModelProto:
    """A sequence of arrays of different shapes is an output."""
    nodes = [
        node("MatMul", "x w1", "a"),
        node("Relu", "a", "r"),
        node("MatMul", "r w2", "y"),
        node("SequenceConstruct", "y r", "both"),
    ]
    model = net(nodes, {"x": ["N", 64]}, WEIGHTS, {"y": ["N", 64]})
    model.graph.output.append(helper.make_tensor_sequence_value_info("both", TensorProto.FLOAT, None))
    return model


def test_a_sequence_is_not_taken_for_a_tensor() -> None:
    loaded = model_io.load(_split())
    types = {value.name: value.type for n in loaded.graph for value in n.outputs}
    assert isinstance(types["part"], ir.TensorType)
    for name in ("parts", "same"):
        assert not isinstance(types[name], ir.TensorType)
    onnx.checker.check_model(model_io.to_proto(loaded), full_check=True)


@pytest.mark.parametrize("build", [_split, _given])
@pytest.mark.parametrize("passes", PASSES)
def test_every_pass_keeps_models_with_sequences_right(passes: str, build: object) -> None:
    model = build()  # type: ignore[operator]
    result = onnxslim.optimize(model, passes, CALIBRATION, bench=False, threads=1)
    assert result.exit_code == 0, result.report.warnings
    outputs = result.report.fidelity["outputs"]
    assert len(outputs) == (1 if build is _split else 3)
    assert all(o["problem"] is None and o["nonfinite"] == 0 for o in outputs)
    if not passes.startswith("prune"):
        assert all(o["relative_l2"] < 0.25 for o in outputs)
