"""Operators written otherwise compute the same in float, and become integer kernels."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.graph import subgraphs
from onnxslim.passes.int8.lowering import (
    clip_bounded,
    convolve_normalizations,
    protect_captured,
    protect_pools,
    spell_out_axes,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracles import apply
from test_units import CONV, FIRST, LAST, X, build, f, kernels, node, quantized


def test_a_pool_with_dilations_has_no_integer_kernel() -> None:
    pool = node("AveragePool", ["c"], "p", kernel_shape=[2, 2], dilations=[2, 2])
    model = build([FIRST, pool, node("Conv", ["p", "v"], "y")], CONV, X.shape, opset=19)
    draft = model.clone()
    protect_pools(draft)
    result, _ = quantized(draft, X)
    assert {"AveragePool", "QLinearConv"} <= kernels(result)
    assert np.linalg.norm(np.subtract(*(runtime.load(m)({"x": X})["y"] for m in (model, result)))) < 1


@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize(("size", "pads"), [(3, [0, 0, 0, 0]), (3, [1, 1, 1, 1]), (4, [2, 0, 1, 3]), (50, [25] * 4)])
def test_windows_that_reach_beyond_the_input(counted: int, size: int, pads: list[int]) -> None:
    pool = node(
        "AveragePool", ["c"], "p", kernel_shape=[size] * 2, strides=[3, 3], ceil_mode=1, count_include_pad=counted,
        pads=pads,
    )  # fmt: skip
    model = build([FIRST, pool, node("Conv", ["p", "v"], "y")], CONV, X.shape)
    draft = model.clone()
    protect_pools(draft)
    result, chosen = quantized(draft, X)
    assert ("AveragePool_p" in chosen) == (not counted or not any(pads))
    # ONNX Runtime's own optimizations move such windows of the float model too.
    exact, same, found = (runtime.load(m, optimize=m is result)({"x": X})["y"] for m in (model, draft, result))
    np.testing.assert_allclose(same, exact, rtol=1e-4, atol=1e-5)
    assert np.linalg.norm(exact - found) < 0.05 * np.linalg.norm(exact)


def normalization(source: str, output: str, **attributes: float) -> onnx.NodeProto:
    return node("BatchNormalization", [source, "scale", "offset", "mean", "variance"], output, **attributes)


STATISTICS = {"scale": f(16), "offset": f(16), "mean": f(16), "variance": np.linspace(0.01, 4, 16, dtype=np.float32)}


@pytest.mark.parametrize("relu", [False, True])
def test_a_normalization_between_convolutions_runs_on_integers(relu: bool) -> None:
    """Where it cannot be folded: two read what is in front of it."""
    behind = [normalization("r", "n", epsilon=1e-3), node("Relu", ["n"], "m")] if relu else [normalization("r", "m")]
    nodes = [FIRST, node("Add", ["c", "x"], "s"), node("Relu", ["s"], "r"), *behind, LAST]
    model = build(
        [*nodes[:-1], node("Conv", ["m", "v"], "k"), node("Add", ["k", "r"], "y")], CONV | STATISTICS, X.shape
    )
    draft = model.clone()
    convolve_normalizations(draft)
    exact, same = (runtime.load(m, optimize=False)({"x": X})["y"] for m in (model, draft))
    np.testing.assert_allclose(same, exact, rtol=1e-4, atol=1e-5)
    result, _ = quantized(draft, X)
    found = kernels(result)
    assert not found & {"Conv", "BatchNormalization", "Relu"}
    assert np.linalg.norm(exact - runtime.load(result)({"x": X})["y"]) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "behind",
    [
        [normalization("c", "y")],
        [normalization("c", "m"), node("Tanh", ["m"], "y")],
        [normalization("c", "m"), node("Conv", ["m", "v"], "k"), node("Add", ["k", "m"], "y")],
    ],
)
def test_others_stay_as_they_are(behind: list[onnx.NodeProto]) -> None:
    model = build([FIRST, *behind], CONV | STATISTICS, X.shape)
    convolve_normalizations(model)
    assert sum(n.op_type == "BatchNormalization" for n in model.graph) == 1


def test_statistics_that_are_no_numbers_stay_as_they_are() -> None:
    broken = STATISTICS | {"scale": np.full(16, np.inf, np.float32)}
    model = build([FIRST, normalization("c", "m"), LAST], CONV | broken, X.shape)
    convolve_normalizations(model)
    assert sum(n.op_type == "BatchNormalization" for n in model.graph) == 1


@pytest.mark.parametrize(
    "between",
    [
        [node("Max", ["c", "low"], "m")],
        [node("Min", ["high", "c"], "m")],
        [node("LeakyRelu", ["c"], "r"), node("Max", ["low", "r"], "m")],
        [node("Max", ["c", "low"], "r"), node("Min", ["r", "high"], "m")],
        [node("Min", ["c", "high"], "r"), node("Max", ["row", "r"], "m")],
    ],
)
def test_numbers_as_bounds_are_those_of_what_is_stored(between: list[onnx.NodeProto]) -> None:
    bounds = {"low": np.float32(-0.4), "high": np.array([0.5], np.float32), "row": np.full((1, 1), -0.2, np.float32)}
    model = build([FIRST, *between, LAST], CONV | bounds, X.shape)
    draft = model.clone()
    clip_bounded(draft)
    assert [n.op_type for n in draft.graph if n.op_type in ("Max", "Min", "Clip")] == ["Clip"]
    exact, same = (runtime.load(m, optimize=False)({"x": X})["y"] for m in (model, draft))
    np.testing.assert_array_equal(same, exact)
    result, _ = quantized(draft, X)
    assert not kernels(result) & {"Conv", "Max", "Min", "Clip", "LeakyRelu"}
    assert np.linalg.norm(exact - runtime.load(result)({"x": X})["y"]) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "between",
    [
        [node("Max", ["c", "c"], "m")],
        [node("Max", ["c", "vector"], "m")],
        [node("Max", ["c", "low", "high"], "m")],
        [node("Min", ["c", "low"], "r"), node("Max", ["r", "high"], "m")],  # bounds that no value keeps
        [node("Max", ["c", "low"], "r"), node("Tanh", ["r"], "t"), node("Min", ["r", "t"], "m")],
        [node("Max", ["c", "low"], "r"), node("Min", ["r", "high"], "q"), node("Add", ["q", "r"], "m")],
    ],
)
def test_other_bounds_give_the_same(between: list[onnx.NodeProto]) -> None:
    bounds = {"low": np.float32(-0.4), "high": np.float32(0.5), "vector": f(16, 1, 1)}
    model = build([FIRST, *between, LAST], CONV | bounds, X.shape)
    draft = model.clone()
    clip_bounded(draft)
    exact, same = (runtime.load(m, optimize=False)({"x": X})["y"] for m in (model, draft))
    np.testing.assert_array_equal(same, exact)


def test_what_a_branch_reads_of_a_reshape_comes_through_a_barrier() -> None:
    """ONNX Runtime would end the process: the DequantizeLinear behind the convolution is moved across the Reshape."""
    condition = [node("ReduceMax", ["r"], "top", keepdims=0), node("Greater", ["top", "zero"], "flag")]
    bodies = {
        f"{branch}_branch": helper.make_graph(
            [node(op, ["r"], f"z{branch}")],
            branch,
            [],
            [helper.make_tensor_value_info(f"z{branch}", onnx.TensorProto.FLOAT, None)],
        )
        for branch, op in (("then", "Sin"), ("else", "Cos"))
    }
    nodes = [FIRST, node("Conv", ["c", "v"], "k"), node("Reshape", ["k", "shape"], "r"), *condition]
    constants = CONV | {"shape": np.array([2, -1]), "zero": np.float32(0)}
    model = build([*nodes, node("If", ["flag"], "y", **bodies)], constants, X.shape)
    draft = model.clone()
    protect_captured(draft)
    inside = [n for outer in draft.graph for body in subgraphs(outer) for n in body]
    assert inside and all(v.producer().op_type == "Max" for n in inside for v in n.inputs)
    result, _ = quantized(draft, X)
    exact, found = (runtime.load(m)({"x": X})["y"] for m in (model, result))
    assert np.linalg.norm(exact - found) < 0.05 * np.linalg.norm(exact)


def test_a_barrier_outlives_what_simplifies_the_model() -> None:
    pool = node("AveragePool", ["c"], "p", kernel_shape=[3, 3], ceil_mode=1, count_include_pad=1, pads=[1] * 4)
    model = build([FIRST, pool, node("Conv", ["p", "v"], "y")], CONV, X.shape)
    protect_pools(model)
    again, _ = apply(model_io.to_proto(model), "simplify,fold,fuse")
    assert [n.op_type for n in again.graph.node].count("Max") == 1


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("inputs", "own"),
    [
        (["c", "", "scales"], {}),
        (["c", "", "", "sizes"], {}),
        (["c", "", "", "found"], {}),
        (["c", "", "", "sizes"], {"keep_aspect_ratio_policy": "not_larger"}),
    ],
)
def test_a_resize_of_some_axes(mode: str, inputs: list[str], own: dict[str, str]) -> None:
    """Between integer convolutions, whose channels are last for ONNX Runtime."""
    up = node("Resize", inputs, "m", mode=mode, axes=[3, -2], **own)
    found = [node("Shape", ["x"], "s", start=2), node("Add", ["s", "odd"], "found")]
    constants = {"scales": np.float32([1.5, 1.25]), "sizes": np.int64([12, 10]), "odd": np.int64([4, 2])}
    unmoved([*found, up], constants)


@pytest.mark.parametrize("scales", [[0.6, 0.5], [2, 2]])
@pytest.mark.parametrize("opset", [13, 18])
def test_a_cubic_resize(scales: list[float], opset: int) -> None:
    constants = {"scales": np.float32([1, 1, *scales])}
    unmoved([node("Resize", ["c", "", "scales"], "m", mode="cubic")], constants, opset)


@pytest.mark.parametrize("axes", [[3, 2], [-2, -1], [-1, 2]])
@pytest.mark.parametrize("computed", [False, True])
def test_a_pad_of_some_axes(axes: list[int], computed: bool) -> None:
    pad = node("Pad", ["c", "found" if computed else "pads", "", "axes"], "m", mode="reflect")
    found = [node("Shape", ["x"], "s"), node("Sub", ["s", "size"], "z"), node("Add", ["z", "pads"], "found")]
    constants = {"pads": np.int64([1, 0, 2, 3]), "axes": np.int64(axes), "size": np.int64(X.shape)}
    unmoved([*(found if computed else []), pad], constants)


def unmoved(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], opset: int = 18) -> None:
    """``nodes`` between two convolutions, from ``c`` to ``m``, compute the same spelled out, and on integers around."""
    model = build([FIRST, *nodes, LAST], CONV | constants, X.shape, opset=opset)
    draft = model.clone()
    spell_out_axes(draft)
    exact, same = (runtime.load(m)({"x": X})["y"] for m in (model, draft))
    np.testing.assert_allclose(same, exact, rtol=1e-4, atol=1e-5)
    result, _ = quantized(draft, X)
    assert "QLinearConv" in kernels(result)
    assert np.linalg.norm(exact - runtime.load(result)({"x": X})["y"]) < 0.05 * np.linalg.norm(exact)
