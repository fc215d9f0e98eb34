"""Layers of two versions of a model: what they cost, and where an error comes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import onnxslim
from onnxslim import layers
from onnxslim import model as model_io

RNG = np.random.default_rng(5)
X = [{"x": RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)} for _ in range(3)]


def _chain(**changed: Any) -> Any:
    """Conv a, BatchNormalization, Relu, Conv b, Relu, Conv c; ``changed`` gives factors for weights."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        chain (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y) {
            a0 = Conv<pads = [1, 1, 1, 1]>(x, wa)
            a1 = BatchNormalization(a0, scale, shift, mean, var)
            a2 = Relu(a1)
            b0 = Conv<pads = [1, 1, 1, 1]>(a2, wb)
            b1 = Relu(b0)
            y = Conv<pads = [1, 1, 1, 1]>(b1, wc)
        }"""
    proto = onnx.parser.parse_model(text)
    for node, name in zip(proto.graph.node, ("a", "bn", "ra", "b", "rb", "c"), strict=True):
        node.name = name
    rng = np.random.default_rng(1)
    arrays = {"wa": (8, 3, 3, 3), "wb": (8, 8, 3, 3), "wc": (4, 8, 3, 3)}
    weights = {name: rng.standard_normal(shape) / 8 for name, shape in arrays.items()}
    weights |= {name: 1 + rng.random(8) for name in ("scale", "shift", "mean", "var")}
    for name, change in changed.items():
        weights[name] = weights[name] * change
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()
    )
    return model_io.load(proto)


def test_a_layer_ends_before_the_next_one() -> None:
    found = layers.find(_chain())
    assert {name: [v.name for v in layer.values] for name, layer in found.items()} == {
        "a": ["a0", "a1", "a2"],
        "b": ["b0", "b1"],
        "c": ["y"],
    }


def test_an_error_is_found_where_it_comes_in() -> None:
    noise = 1 + 0.3 * RNG.standard_normal((8, 8, 3, 3))
    rows = {row["layer"]: row for row in layers.errors(_chain(), _chain(wb=noise), X)}
    assert rows["a"]["error"] < 1e-5
    assert rows["b"]["added"] > 0.1
    assert rows["c"]["error"] > 0.05
    assert max(rows, key=lambda name: rows[name]["added"]) == "b"


def test_folding_and_moving_scales_is_no_error() -> None:
    original = _chain()
    folded = onnxslim.optimize(original, "simplify,fold", bench=False).model
    assert "BatchNormalization" not in {n.op_type for n in folded.graph}
    rows = layers.errors(original, folded, X)
    assert [row["layer"] for row in rows] == ["a", "b", "c"]
    assert max(row["error"] for row in rows) < 1e-5
    # Positive factors pass through Relu: the first layer's outputs are scaled, the next one's weights take it back.
    factor = np.linspace(0.5, 2.0, 8)
    moved = _chain(scale=factor, shift=factor, wb=1 / factor[None, :, None, None])
    rows = layers.errors(original, moved, X)
    assert max(row["error"] for row in rows) < 1e-4
    assert rows[0]["compared_with"] in ("a0", "a1")


def test_costs_before_and_after_int8() -> None:
    original = _chain()
    result = onnxslim.optimize(original, "int8(measure=false)", calibration=X, bench=False).model
    before, after = layers.costs(original, X), layers.costs(result, X)
    rows = layers.joined(before, after)
    assert [row["layer"] for row in rows] == ["a", "b", "c"]
    assert [row["before"]["bits"] for row in rows] == [32] * 3
    quantized = [row for row in rows if row["after"]["bits"] == 8]
    assert quantized
    for row in rows:
        assert row["before"]["macs"] == row["after"]["macs"]
        assert row["before"]["channels"] == row["after"]["channels"]
        assert row["before"]["ms"] > 0
    assert all(row["after"]["bytes"] < row["before"]["bytes"] for row in quantized)
    name = quantized[0]["layer"]
    (weights, outputs) = layers.histograms(original, result, [name], X)
    assert (weights["kind"], outputs["kind"]) == ("weights", "outputs")
    for row in (weights, outputs):
        assert sum(row["after"]["counts"]) == sum(row["before"]["counts"])
    real = layers.weight(layers.find(result)[name])
    assert real is not None and np.abs(real).max() < 10, "integers are shown as the numbers they stand for"


def test_a_layer_only_one_model_has_is_shown_alone() -> None:
    rows = layers.joined({"a": {"operator": "Conv"}}, {"b": {"operator": "Gemm"}})
    assert [(row["layer"], row["operator"], row["before"], row["after"]) for row in rows] == [
        ("a", "Conv", {"operator": "Conv"}, None),
        ("b", "Gemm", None, {"operator": "Gemm"}),
    ]


def test_histograms_of_odd_values() -> None:
    assert layers.histogram(np.array([np.nan, np.inf]))["counts"] == []
    assert sum(layers.histogram(np.array([3.0, 3.0, np.nan]))["counts"]) == 2


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_the_unexplained_part_is_that_of_a_fit_by_channel(shift: float) -> None:
    want = RNG.standard_normal((2, 3, 50)) + shift
    got = want * np.array([2.0, -1.0, 0.5])[None, :, None] + 3 + 0.1 * RNG.standard_normal((2, 3, 50))
    pair = layers._Pair(1)
    for a, b in zip(want, got, strict=True):
        pair.add(a[None], b[None])
    residual = spread = 0.0
    for k in range(3):
        x, y = got[:, k].ravel(), want[:, k].ravel()
        fit = np.polyfit(x, y, 1)
        residual += float(((np.polyval(fit, x) - y) ** 2).sum())
        spread += float(((y - y.mean()) ** 2).sum())
    assert pair.unexplained == pytest.approx(np.sqrt(residual / spread), rel=1e-6)
    assert pair.relative == pytest.approx(np.linalg.norm(got - want) / np.linalg.norm(want))
