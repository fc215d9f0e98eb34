"""Constant folding: what may be computed is, what would grow the file or change at every run is not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from oracles import apply, assert_same, operators

from onnxslim import model as model_io
from onnxslim.folding import fold_constants
from onnxslim.shapes import Shapes

HEADER = '<ir_version: 8, opset_import: ["" : 17]> g '


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def weight(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_a_transposed_weight_is_stored_transposed() -> None:
    proto = build(
        "(float[n, 64] x) => (float[n, 32] y) { t = Transpose<perm=[1, 0]>(w) y = MatMul(x, t) }", w=weight(32, 64)
    )
    result, _ = apply(proto, "simplify")
    assert operators(result) == ["MatMul"]
    assert result.ByteSize() <= proto.ByteSize()
    assert_same(proto, result, {"x": weight(3, 64)})


def test_the_transpose_of_a_shared_weight_stays_and_says_why() -> None:
    proto = build(
        """(int64[n] i, float[n, 64] x) => (float[n, 32] y, float[n, 64] z) {
            t = Transpose<perm=[1, 0]>(w)
            y = MatMul(x, t)
            z = Gather(w, i)
        }""",
        w=weight(32, 64),
    )
    result, (outcome,) = apply(proto, "simplify")
    assert sorted(operators(result)) == ["Gather", "MatMul", "Transpose"]
    assert [s.node for s in outcome.skipped] == ["t"]
    assert "8192 bytes" in outcome.skipped[0].reason


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("t = Expand(w, s)", {"w": weight(1, 64), "s": np.array([64, 64])}),
        ("t = Tile(w, s)", {"w": weight(1, 64), "s": np.array([64, 1])}),
        ("t = ConstantOfShape(s)", {"s": np.array([64, 64])}),
        (
            "r = Range(a, b, c) t = Reshape(r, s)",
            {"a": np.float32(0), "b": np.float32(4096), "c": np.float32(1), "s": np.array([64, 64])},
        ),
    ],
)
def test_what_spreads_a_little_over_much_is_not_stored(text: str, weights: dict[str, np.ndarray]) -> None:
    proto = build(
        "(float[64, 64] x) => (float[64, 64] y) { " + text + " y = MatMul(x, t) }",
        **{k: np.asarray(v) for k, v in weights.items()},
    )
    result, (outcome,) = apply(proto, "simplify")
    assert result.ByteSize() <= proto.ByteSize() + 64
    assert "folded" not in outcome.stats
    assert outcome.skipped


def test_a_long_way_to_something_small_is_folded_whole() -> None:
    proto = build(
        """(float[4] x) => (float[4] y) {
            a = Expand(w, s)
            b = Sigmoid(a)
            c = ReduceMean<axes=[0, 1], keepdims=0>(b)
            y = Mul(x, c)
        }""",
        w=weight(1, 64),
        s=np.array([64, 64]),
    )
    result, (outcome,) = apply(proto, "simplify")
    assert operators(result) == ["Mul"]
    assert outcome.stats["folded"] == 3
    assert_same(proto, result, {"x": weight(4)}, rtol=0)


def test_what_leads_to_a_result_that_is_too_large_is_folded() -> None:
    proto = build(
        """(float[64, 64] x) => (float[64, 64] y) {
            a = Exp(w)
            b = Neg(a)
            c = Expand(b, s)
            y = Add(x, c)
        }""",
        w=weight(1, 1),
        s=np.array([64, 1]),
    )
    result, _ = apply(proto, "simplify")
    assert operators(result) == ["Add"]  # the sum broadcasts by itself


@pytest.mark.parametrize(
    "text",
    [
        "r = RandomNormalLike(w)",
        "r = RandomUniformLike(w)",
        "r = Bernoulli(w)",
        "r, m = Dropout(w, half, yes)",
        "a = RandomNormal<shape=[4]>() r = Mul(a, w)",
    ],
)
def test_random_numbers_are_never_stored(text: str) -> None:
    proto = build(
        "(float[4] x) => (float[4] y) { " + text + " y = Add(x, r) }",
        w=np.full(4, 0.5, np.float32),
        half=np.array(0.5, np.float32),
        yes=np.array(True),
    )
    result, _ = apply(proto, "simplify")
    assert len(operators(result)) == len(operators(proto))


def test_a_dequantized_weight_stays_quantized() -> None:
    proto = build(
        """(float[n, 4] x) => (float[n, 4] y) {
            w = DequantizeLinear(q, s)
            y = MatMul(x, w)
        }""",
        q=np.arange(16, dtype=np.int8).reshape(4, 4),
        s=np.array(0.5, np.float32),
    )
    result, _ = apply(proto, "simplify")
    assert operators(result) == ["DequantizeLinear", "MatMul"]


def test_constants_in_subgraphs_move_out() -> None:
    proto = build(
        """(bool c, float[4] x) => (float[4] y) {
            y = If(c) <
                then_branch = yes () => (float[4] a) { k = Exp(w) a = Mul(x, k) },
                else_branch = no () => (float[4] b) { l = Neg(w) b = Add(x, l) }
            >
        }""",
        w=weight(4),
    )
    result, (outcome,) = apply(proto, "simplify")
    assert outcome.stats["folded"] == 2
    for value in (True, False):
        assert_same(proto, result, {"c": np.array(value), "x": weight(4)}, rtol=0)


def test_one_node_that_cannot_be_computed_does_not_keep_the_others() -> None:
    """The index lies outside, in a branch that is not taken; what surrounds it is folded all the same."""
    proto = build(
        """(bool c, float[4] x) => (float[4] y) {
            e = Exp(w)
            y = If(c) <
                then_branch = yes () => (float[4] a) { k = Neg(e) a = Mul(x, k) },
                else_branch = no () => (float[4] b) { l = Gather(e, bad) m = Abs(l) b = Add(x, m) }
            >
        }""",
        w=weight(4),
        bad=np.array([7]),
    )
    model = model_io.load(proto)
    result = fold_constants(model, Shapes(model).run())
    assert [s.node for s in result.skipped] == ["l"]
    assert result.nodes == 2
    assert_same(proto, model_io.to_proto(model), {"c": np.array(True), "x": weight(4)}, rtol=0)


def test_a_constant_output_keeps_its_name() -> None:
    proto = build(
        "(float[4] x) => (float[4] y, float[4] k) { a = Exp(w) k = Neg(a) y = Add(x, k) }",
        w=weight(4),
    )
    result, _ = apply(proto, "simplify")
    assert sorted(operators(result)) == ["Add", "Identity"]
    assert_same(proto, result, {"x": weight(4)}, rtol=0)
