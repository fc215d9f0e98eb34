"""Small models for tests of single rules, from their parts, and what a pass makes of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from oracles import apply, assert_same

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def net(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[Any]],
    weights: dict[str, np.ndarray],
    outputs: dict[str, Sequence[Any] | None] | Sequence[str] = ("y",),
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model from its parts; an output without a shape leaves it to inference."""
    shapes = outputs if isinstance(outputs, dict) else dict.fromkeys(outputs)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, dtype, s) for n, s in shapes.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(op: str, inputs: str, output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), name=f"node_{output.split()[0]}", **attributes)


def fold(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """``model`` folded, after checking that it still computes the same."""
    result, _ = apply(model, "fold")
    assert_same(model, result, feeds)
    return result


def reasons(model: onnx.ModelProto) -> list[str]:
    return [skip.reason for skip in apply(model, "fold")[1][0].skipped]


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def batchnorm(channels: int, prefix: str = "") -> dict[str, np.ndarray]:
    arrays = {f"{prefix}{name}": normal(channels) for name in ("scale", "shift", "mean")}
    return {**arrays, f"{prefix}var": np.abs(normal(channels)) + np.float32(0.5)}


BN = "scale shift mean var"
