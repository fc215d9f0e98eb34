"""What is added up before a LayerNormalization becomes one Sum, unless that would break something."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import net, node, normal
from oracles import CONTEXT, apply, assert_same, operators

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.pipeline import parse

SHAPE = (2, 5, 8)


def layer(
    *nodes: onnx.NodeProto, shape: tuple[Any, ...] = ("n", "s", 8), outputs: tuple[str, ...] = ("y",)
) -> onnx.ModelProto:
    """x through a product, ``nodes`` that end in r, and a LayerNormalization."""
    weights = {"w": normal(8, 8), "b": normal(8), "g": normal(8), "t": normal(8)}
    all_nodes = [
        node("MatMul", "x w", "m"),
        node("Tanh", "x", "h"),
        *nodes,
        node("LayerNormalization", "r g t", axis=-1),
    ]
    return net(all_nodes, {"x": shape}, weights, outputs)


def fused(model: onnx.ModelProto) -> list[str]:
    result, _ = apply(model, "fuse")
    x = normal(*SHAPE[-len(model.graph.input[0].type.tensor_type.shape.dim) :])
    assert_same(model, result, {"x": x}, 1e-5)
    again, _ = apply(result, "simplify,fold,fuse")
    assert operators(again) == operators(result)
    return [op for op in operators(result) if op != "Tanh"]


BIAS, RESIDUAL = node("Add", "m b", "a"), node("Add", "a h", "r")


def test_bias_and_residual() -> None:
    assert fused(layer(BIAS, RESIDUAL)) == ["MatMul", "Sum", "LayerNormalization"]
    assert fused(layer(BIAS, RESIDUAL, outputs=("y", "r"))) == ["MatMul", "Sum", "LayerNormalization"]
    assert fused(layer(node("Add", "h m", "r"))) == ["MatMul", "Sum", "LayerNormalization"]


def test_the_runtime_then_runs_no_slower_kernel() -> None:
    model = layer(BIAS, RESIDUAL)
    kernels = [n.op_type for n in runtime.optimized(model_io.load(apply(model, "fuse")[0]), threads=1).graph]
    assert sorted(kernels) == ["LayerNormalization", "MatMul", "Sum", "Tanh"]


def test_sums_that_others_read_stay_apart() -> None:
    assert fused(layer(BIAS, RESIDUAL, outputs=("y", "a"))) == ["MatMul", "Add", "Sum", "LayerNormalization"]


def test_a_bias_alone_stays() -> None:
    assert fused(layer(node("Add", "m b", "r"), outputs=("y", "h"))) == ["MatMul", "Add", "LayerNormalization"]


def test_the_bias_of_a_matrix_stays_with_its_product() -> None:
    model = layer(BIAS, RESIDUAL, shape=("n", 8))
    result, _ = apply(model, "fuse")
    assert operators(result) == ["MatMul", "Tanh", "Add", "Sum", "LayerNormalization"]
    assert_same(model, result, {"x": normal(5, 8)}, 1e-5)


@pytest.mark.parametrize("target", ["cuda", "openvino"])
def test_other_targets_keep_their_fused_kernel(target: str) -> None:
    model = model_io.load(layer(BIAS, RESIDUAL))
    (fuse,) = parse("fuse")
    fuse.apply(model, type(CONTEXT)(CONTEXT.calibration, synthetic=True, target=target))
    assert [n.op_type for n in model.graph] == ["MatMul", "Tanh", "Add", "Add", "LayerNormalization"]
