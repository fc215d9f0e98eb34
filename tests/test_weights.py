"""Weights that nothing can be told about stay as they are, and calibration data that says nothing is no defect."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import onnxslim

sys.path.insert(0, str(Path(__file__).parent))
from nets import net, node, normal

PASSES = ["int8(measure=false)", "int4", "sparsify", "sparsify(ratio=0.3)", "cluster", "prune(ratio=0.3)", "fp16"]


def _two_layers(first: np.ndarray) -> onnx.ModelProto:
    nodes = [node("MatMul", "x w1", "a"), node("Relu", "a", "r"), node("MatMul", "r w2", "y")]
    return net(nodes, {"x": ["N", 64]}, {"w1": first, "w2": normal(128, 64) / 8}, {"y": ["N", 64]})


@pytest.mark.parametrize("number", [np.nan, np.inf, 1e16])
@pytest.mark.parametrize("passes", ["int4", "int8_weights", "sparsify(ratio=0.3)", "sparsify", "cluster"])
def test_weights_without_finite_squares_stay(passes: str, number: float) -> None:
    weight = normal(64, 128)
    weight[3, 5] = number
    result = onnxslim.optimize(_two_layers(weight), passes, {"x": normal(8, 64)}, bench=False, threads=1)
    assert result.exit_code == 0, result.report.warnings
    skipped = [s for s in result.report.passes[-1]["skipped"] if "too large to be squared" in s["reason"]]
    assert [s["node"] for s in skipped] == ["node_a"]
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in result.proto().graph.initializer}
    assert any(np.array_equal(array, weight, equal_nan=True) for array in kept.values())


@pytest.mark.parametrize("number", [np.nan, np.inf, 0.0])
@pytest.mark.parametrize("passes", PASSES)
def test_samples_that_say_nothing_are_no_defect(passes: str, number: float) -> None:
    x = np.full((8, 64), number, np.float32)
    result = onnxslim.optimize(_two_layers(normal(64, 128) / 8), passes, {"x": x}, bench=False, threads=1)
    assert result.exit_code == 0, result.report.warnings


@pytest.mark.parametrize("passes", [*PASSES, "dynamic_int8", "int8_weights", "bf16"])
def test_a_pass_that_finds_nothing_to_change_says_so(passes: str) -> None:
    model = net([node("Add", "x x", "y")], {"x": ["N"]}, {}, {"y": ["N"]}, dtype=onnx.TensorProto.INT64)
    result = onnxslim.optimize(model, passes, {"x": np.arange(8)}, bench=False, threads=1)
    assert result.exit_code == 0
    name = passes.partition("(")[0]
    (skipped,) = next(p for p in result.report.passes if p["name"] == name)["skipped"]
    assert skipped == {
        "node": "*",
        "reason": f"the model has nothing that {passes.split('(')[0]} changes (onnxslim passes {passes.split('(')[0]} "
        "says what it does)",
    }


@pytest.mark.parametrize("passes", PASSES[1:3] + PASSES[4:5] + ["int8_weights", "cluster(bits=4)", "dynamic_int8"])
def test_operators_that_the_runtime_does_not_know_are_no_defect(passes: str) -> None:
    model = _two_layers(normal(64, 128))
    model.graph.node.append(helper.make_node("Own", ["y"], ["z"], domain="own"))
    model.graph.output[0].name = "z"
    model.opset_import.append(helper.make_opsetid("own", 1))
    result = onnxslim.optimize(model, passes, bench=False, threads=1)
    assert result.exit_code == 0, result.report.warnings
    assert "NOT VERIFIED" in result.report.warnings[0]
