"""Rounding of weights: the result of a product moves less than with rounding to nearest."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from onnxslim.quantization import QParams, dequantize, may_saturate, quantize, weight_params, within_pairs
from onnxslim.rounding import Gram, refine, round_rows, spreading
from onnxslim.units import Kind, Unit

RNG = np.random.default_rng()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same numbers, whichever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state


def unit(op: str, **attributes: Any) -> Unit:
    node = ir.node(op, [ir.Value(name="x"), ir.Value(name="w")], attributes)
    axis = 1 if op != "Conv" and not attributes.get("transB") else 0
    return Unit("n", Kind.PRODUCT, node, ("x",), ("y",), weight=(1, axis))


def correlated(*shape: int) -> np.ndarray:
    """Neighbouring channels are much alike, as in real activations."""
    noise = RNG.standard_normal(shape)
    return (noise + 3 * RNG.standard_normal((shape[0], 1, *shape[2:])) + 2).astype(np.float32)


def error(rows: np.ndarray, steps: np.ndarray, scale: np.ndarray, moments: np.ndarray) -> float:
    gap = steps * scale[:, None] - rows
    return float(np.einsum("ok,kl,ol->", gap, moments, gap))


def test_beats_rounding_to_nearest() -> None:
    x = correlated(500, 100).astype(np.float64)
    rows = RNG.standard_normal((8, 100))
    scale = np.abs(rows).max(1) / 127
    moments = x.T @ x / len(x)
    nearest = np.rint(rows / scale[:, None])
    assert error(rows, round_rows(rows, scale, spreading(moments)), scale, moments) < 0.3 * error(
        rows, nearest, scale, moments
    )


def test_limited_pairs_stay_within_their_limit_and_beat_rounding_to_nearest() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((500, 100)) + 3 * rng.standard_normal((500, 1)) + 2).astype(np.float64)
    rows = rng.standard_normal((8, 100))
    pairs = rng.permutation(100).reshape(-1, 2)
    scale = np.abs(rows).max(1) / 127
    moments = x.T @ x / len(x)
    nearest = within_pairs(np.rint(rows / scale[:, None]), pairs)
    found = round_rows(rows, scale, spreading(moments), pairs)
    assert may_saturate(round_rows(rows, scale, spreading(moments)), pairs), "without the limit it is exceeded"
    assert not may_saturate(found, pairs)
    assert error(rows, found, scale, moments) < 0.5 * error(rows, nearest, scale, moments)


def test_comes_near_the_best_of_all_roundings() -> None:
    """On average: for a single row rounding to nearest may happen to be the best."""
    rng = np.random.default_rng(2)
    x = correlated(200, 6).astype(np.float64)
    moments = x.T @ x / len(x)
    found = best = nearest = 0.0
    for row in rng.standard_normal((40, 1, 6)):
        scale = np.abs(row).max(1) / 7
        best += min(
            error(row, np.floor(row / scale[:, None]) + np.array(up), scale, moments)
            for up in itertools.product((0, 1), repeat=6)
        )
        nearest += error(row, np.rint(row / scale[:, None]), scale, moments)
        found += error(row, round_rows(row, scale, spreading(moments)), scale, moments)
    assert found <= best + 0.1 * (nearest - best)


@pytest.mark.parametrize(
    ("op", "attributes", "weight"),
    [
        ("Conv", {"pads": [1, 1, 1, 1], "strides": [2, 1]}, (8, 6, 3, 3)),
        ("Conv", {"group": 6, "pads": [1, 0, 1, 2]}, (48, 1, 3, 3)),
        ("Conv", {"group": 2, "dilations": [2, 2]}, (4, 3, 2, 2)),
        ("Conv", {"auto_pad": "SAME_UPPER"}, (5, 6, 3, 3)),
        ("MatMul", {}, (12, 7)),
        ("Gemm", {"transB": 1}, (7, 12)),
    ],
)
def test_results_move_less(op: str, attributes: dict[str, Any], weight: tuple[int, ...]) -> None:
    import onnxruntime as ort
    from onnx import TensorProto, helper

    w = RNG.standard_normal(weight).astype(np.float32)
    x = correlated(3, 6, 9, 8) if op == "Conv" else correlated(200, 12)
    found = unit(op, **attributes)
    gram = Gram(found, weight, 1000)
    gram.update(x)
    assert found.weight is not None
    axis = found.weight[1] or 0
    # Few levels, so that rounding matters.
    params = weight_params(w, axis)
    params = QParams(params.scale * 16, params.zero_point, params.axis)
    plain = quantize(w, params)
    better = refine(w, plain, params, gram, axis)
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in (("x", x), ("w", w))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = ort.InferenceSession(proto.SerializeToString())

    def result(array: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(None, {"x": x, "w": array})[0])

    exact = result(w)
    moved = [np.square(result(dequantize(q, params)) - exact).sum() for q in (plain, better)]
    assert moved[1] < 0.9 * moved[0]


def test_without_rows_nothing_changes() -> None:
    w = RNG.standard_normal((4, 3, 5, 5)).astype(np.float32)
    gram = Gram(unit("Conv"), w.shape, 100)
    gram.update(np.zeros((1, 3, 2, 2), np.float32))  # smaller than the window
    params = weight_params(w, 0)
    plain = quantize(w, params)
    np.testing.assert_array_equal(refine(w, plain, params, gram, 0), plain)


@pytest.mark.parametrize("most", [500, 1300])
def test_moments_of_many_samples_are_those_of_all_their_rows(most: int) -> None:
    gram = Gram(unit("MatMul"), (6, 4), most)
    arrays = [correlated(count, 6) for count in (300, 700, 900, 1200, 100, 1, 0, 450, 800, 400, 3000)]
    arrays.insert(3, np.full((5, 6), np.nan, np.float32))
    for k, array in enumerate(arrays):
        gram.update(array)
        if k == 5:
            gram.finish()
    used = [a[:: -(-len(a) // most) or 1] for a in arrays if np.isfinite(a).all()]
    rows = np.concatenate(used).astype(np.float64)
    np.testing.assert_allclose(gram.matrix[0], rows.T @ rows / len(rows), rtol=1e-5)
    assert gram.count == len(rows) > 2048


def test_large_samples_take_no_more_memory_than_small_ones() -> None:
    held = []
    for count in (600, 16_384):
        array = correlated(count, 64)
        tracemalloc.start()
        gram = Gram(unit("MatMul"), (64, 4), count)
        gram.update(array)
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert gram.matrix.any()
    assert held[1] < 1.1 * held[0]
