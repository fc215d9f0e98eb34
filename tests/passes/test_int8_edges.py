"""`int8` on what is legal and rare: numbers that are not finite, nothing at all, attributes that nobody uses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from onnxslim import data, runtime
from onnxslim.contract import Context
from onnxslim.passes.int8 import Int8

sys.path.insert(0, str(Path(__file__).parent))
from test_int8 import RNG, build, error, filters, kernels, residual, run, samples

EXACT = Int8(measure=False, fidelity=0)


def matrix(rows: int, columns: int) -> np.ndarray:
    return (RNG.standard_normal((rows, columns)) / np.sqrt(rows)).astype(np.float32)


@pytest.mark.parametrize("what", ["w", "b"])
@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_product_with_an_infinite_number_stays_in_float(op: str, what: str) -> None:
    weights = {"w": matrix(32, 32), "b": RNG.standard_normal(32).astype(np.float32), "v": matrix(32, 32)}
    weights[what][..., 3] = -np.inf
    head = [helper.make_node("MatMul", ["r", "w"], ["m"], name="head"), helper.make_node("Add", ["m", "b"], ["y"])]
    if op == "Gemm":
        head = [helper.make_node("Gemm", ["r", "w", "b"], ["y"], name="head")]
    first = [helper.make_node("MatMul", ["x", "v"], ["a"], name="first"), helper.make_node("Relu", ["a"], ["r"])]
    model = build([*first, *head], weights, ["n", 32])
    small, outcome = run(model, EXACT, samples((16, 32)))
    assert ("head", "its weight or bias is not finite") in [(skip.node, skip.reason) for skip in outcome.skipped]
    assert outcome.stats["int8_layers"] == 1
    (want,), (got,) = (runtime.load(m)(samples((16, 32))[0]).values() for m in (model, small))
    assert np.array_equal(np.isfinite(want), np.isfinite(got))
    assert np.array_equal(np.isneginf(want), np.isneginf(got))


@pytest.mark.parametrize("constant", ["empty", "infinite"])
def test_constants_that_have_no_range_stay_in_float(constant: str) -> None:
    array = np.zeros((1, 0, 12, 12)) if constant == "empty" else np.full((1, 8, 12, 12), -np.inf)
    weights = {"w1": filters(8, 8), "w2": filters(8, 8), "e": array.astype(np.float32)}
    weights["w3"] = filters(8, 16 + array.shape[1])
    same = {"pads": [1, 1, 1, 1]}
    behind = [helper.make_node("Relu", ["c"], ["d"])]  # which makes 0 of what is infinite
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="one", **same),
        helper.make_node("Conv", ["x", "w2"], ["b"], name="two", **same),
        helper.make_node("Concat", ["a", "b", "e"], ["c"], axis=1, name="all"),
        *behind,
        helper.make_node("Conv", ["d", "w3"], ["y"], name="three", **same),
    ]
    model = build(nodes, weights, [1, 8, 12, 12])
    small, outcome = run(model, EXACT, samples((1, 8, 12, 12)))
    assert outcome.stats["int8_layers"] >= 2
    assert error(model, small, samples((1, 8, 12, 12))[0]) < 0.05


@pytest.mark.parametrize("alpha, beta", [(0.5, 1.0), (1.0, 0.25), (1.0, 0.0)])
@pytest.mark.parametrize("bias", [True, False])
def test_factors_of_a_gemm_count(alpha: float, beta: float, bias: bool) -> None:
    """Behind a bottleneck whose channels are centred far from zero."""
    weights = {"w": matrix(64, 16), "b": np.linspace(5, 9, 16, dtype=np.float32), "v": matrix(16, 64)}
    weights["c"] = RNG.standard_normal(64).astype(np.float32)
    second = ["h", "v", *(["c"] if bias else [])]
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="first"),
        helper.make_node("Gemm", second, ["y"], name="second", alpha=alpha, beta=beta),
    ]
    model = build(nodes, weights, ["n", 64])
    small, outcome = run(model, EXACT, samples((32, 64)))
    assert outcome.stats["int8_layers"] >= 1
    assert error(model, small, samples((32, 64))[0]) < 0.02


def test_what_a_crop_fills_the_outside_with_is_kept() -> None:
    weights = {"w1": filters(8, 8), "b1": np.full(8, 1, np.float32), "w2": filters(8, 8)}
    weights |= {"roi": np.array([0, 0, -1, -1, 1, 1, 2, 2], np.float32), "sizes": np.array([1, 8, 12, 12])}
    crop = {"mode": "nearest", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": -7.0}
    same = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["a"], name="one", **same),
        helper.make_node("Resize", ["a", "roi", "", "sizes"], ["r"], name="crop", **crop),
        helper.make_node("Conv", ["r", "w2"], ["y"], name="two", **same),
    ]
    model = build(nodes, weights, [1, 8, 12, 12])
    small, outcome = run(model, EXACT, samples((1, 8, 12, 12)))
    assert outcome.stats["int8_layers"] == 2
    assert error(model, small, samples((1, 8, 12, 12))[0]) < 0.05


def test_a_sample_with_nothing_in_it_says_nothing() -> None:
    weights = {"w1": filters(8, 8), "w2": filters(8, 8), "g": matrix(8, 8)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "w2"], ["b"], name="two"),
        helper.make_node("GlobalAveragePool", ["b"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "g"], ["y"], name="three"),
    ]
    model = build(nodes, weights, ["n", 8, 12, 12])
    feeds = samples((2, 8, 12, 12), 5)
    feeds[2] = {"x": np.zeros((0, 8, 12, 12), np.float32)}
    small, outcome = run(model, EXACT, feeds)
    assert outcome.stats["int8_layers"] == 3
    assert error(model, small, feeds[0]) < 0.05


def test_a_rank_that_only_samples_show_is_not_relied_on() -> None:
    weights = {"w": matrix(16, 16), "b": RNG.standard_normal(16).astype(np.float32)}
    nodes = [
        helper.make_node("Squeeze", ["x"], ["s"]),
        helper.make_node("MatMul", ["s", "w"], ["m"], name="product"),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("Softmax", ["a"], ["y"]),
    ]
    model = build(nodes, weights, ["n", 16, 1, 1])
    small = model.clone()
    ctx = Context(calibration=data.open_data(samples((4, 16, 1, 1)), data.input_specs(model)), threads=1)
    assert EXACT.apply(small, ctx).stats["int8_layers"] == 1
    assert error(model, small, samples((1, 16, 1, 1))[0]) < 0.05


def test_a_layer_to_keep_that_is_not_there_is_named() -> None:
    model = residual()
    ctx = Context(calibration=data.open_data(samples((1, 8, 12, 12)), data.input_specs(model)), threads=1)
    Int8(measure=False, keep=("second", "secnd")).apply(model, ctx)
    assert [line for line in ctx.warnings if "keep" in line] == ["int8: no layer is called 'secnd' (keep)"]


def test_the_error_of_a_stored_constant_is_seen() -> None:
    """A factor of 0.1 is 0 in steps that one of 100, which does nothing, makes necessary."""
    factor = np.full((8, 1, 1), 0.1, np.float32)
    factor[0] = 100
    weights = {"w1": filters(8, 8), "w2": filters(8, 8), "factor": factor}
    weights["w1"][0] = 0
    same = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="one", **same),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Mul", ["r", "factor"], ["m"], name="scaled"),
        helper.make_node("Add", ["m", "r"], ["s"], name="sum"),
        helper.make_node("Conv", ["m", "w2"], ["t"], name="two", **same),
        helper.make_node("Add", ["t", "s"], ["y"], name="all"),
    ]
    model = build(nodes, weights, [1, 8, 12, 12])
    small, outcome = run(model, Int8(measure=False, equalize=False), samples((1, 8, 12, 12), 48))
    assert outcome.stats["fidelity"] >= 0.99
    assert error(model, small, samples((1, 8, 12, 12), 49)[-1]) < 0.15
    assert "QLinearConv" in kernels(small)
