"""Equal weights and equal computations: merged when equal to the bit, and only then."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxslim import model as model_io
from onnxslim import sharing
from onnxslim.graph import set_constant

sys.path.insert(0, str(Path(__file__).parent))
from oracles import apply, assert_same, interface, node_count, operators

HEADER = '<ir_version: 8, opset_import: ["" : 17]> g '


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def test_only_weights_that_begin_alike_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tail = np.concatenate([np.ones(900, np.float32), np.zeros(100, np.float32)])
    weights = {
        "a": np.ones(1000, np.float32),
        "b": tail,
        "c": np.zeros(1000, np.float32),
        "d": np.ones(1000, np.float32),
    }
    text = "(float[1000] x) => (float[1000] y) { p = Add(x, a) q = Mul(p, b) r = Sub(q, c) y = Div(r, d) }"
    onnx.save(build(text, **weights), tmp_path / "model.onnx")
    model = model_io.load(tmp_path / "model.onnx")
    set_constant(model.graph.initializers["d"], weights["d"])  # one in memory, its equal in the file
    read = []
    digest = sharing._digest
    monkeypatch.setattr(sharing, "_digest", lambda tensor: read.append(tensor) or digest(tensor))
    assert sharing.deduplicate_initializers(model) == (1, 4000)
    assert len(read) == 3
    assert sorted(model.graph.initializers) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("one", "two", "left"),
    [
        (np.array([1.0, 2.0], np.float32), np.array([1.0, 2.0], np.float32), 1),
        (np.array([np.nan, 2.0], np.float32), np.array([np.nan, 2.0], np.float32), 1),
        (np.array([0.0, 2.0], np.float32), np.array([-0.0, 2.0], np.float32), 2),
        (np.array([1.0, 2.0], np.float32), np.array([[1.0, 2.0]], np.float32), 2),
        (np.zeros(64, np.float32), np.zeros(64, np.float32), 1),
    ],
)
def test_weights_are_shared_when_their_bits_are_equal(one: np.ndarray, two: np.ndarray, left: int) -> None:
    proto = build(
        "(float[n, 2] x) => (float[a, b] y, float[c, d] z) { y = Pow(x, v) z = Mod<fmod=1>(x, w) }", v=one, w=two
    )
    if one.size == 64:
        proto = build(
            "(float[n, 64] x) => (float[a, b] y, float[c, d] z) { y = Pow(x, v) z = Mod<fmod=1>(x, w) }", v=one, w=two
        )
    result, _ = apply(proto, "simplify")
    assert len(result.graph.initializer) == left


def test_weights_that_are_outputs_stay() -> None:
    proto = build(
        "(float[2] x) => (float[2] y, float[2] v, float[2] w) { a = Pow(x, u) b = Pow(a, v) y = Pow(b, w) }",
        u=np.array([1.5, 2.0], np.float32),
        v=np.array([1.5, 2.0], np.float32),
        w=np.array([1.5, 2.0], np.float32),
    )
    result, _ = apply(proto, "simplify")
    assert {t.name for t in result.graph.initializer} == {"v", "w"}
    assert_same(proto, result, {"x": np.array([2, 3], np.float32)}, rtol=0)


def test_equal_nodes_are_one_and_outputs_keep_their_names() -> None:
    proto = build(
        """(float[n] x, float[n] z) => (float[n] p, float[n] q, float[n] r) {
            a = Add(x, z)
            b = Add(z, x)
            p = Exp(a)
            q = Exp(b)
            c = Sub(x, z)
            d = Sub(z, x)
            r = Mul(c, d)
        }"""
    )
    result, _ = apply(proto, "simplify")
    assert sorted(operators(result)) == ["Add", "Exp", "Identity", "Mul", "Sub", "Sub"]
    assert interface(result) == interface(apply(proto, "")[0])
    assert_same(proto, result, {k: np.array([1, 2], np.float32) for k in "xz"}, rtol=0)


def test_random_nodes_are_never_one() -> None:
    proto = build("(float[100] x) => (float[100] y) { a = RandomNormalLike(x) b = RandomNormalLike(x) y = Sub(a, b) }")
    assert node_count(apply(proto, "simplify")[0]) == 3


def test_operators_of_other_domains_are_left_alone() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]> g (float[2] x) => (float[2] y) {
            a = mine.Count(x)
            b = mine.Count(x)
            y = Sub(a, b)
        }"""
    )
    assert node_count(apply(proto, "simplify")[0]) == 3


def test_attributes_count_to_the_bit() -> None:
    proto = build(
        """(float[n] x) => (float[n] y) {
            a = LeakyRelu<alpha=0.0>(x)
            b = LeakyRelu<alpha=-0.0>(x)
            c = LeakyRelu<alpha=0.0>(x)
            d = Div(a, b)
            y = Div(d, c)
        }"""
    )
    assert operators(apply(proto, "simplify")[0]).count("LeakyRelu") == 2


def test_a_branch_reuses_what_was_computed_before_it() -> None:
    proto = build(
        """(bool c, float[4] x) => (float[4] y, float[4] z) {
            z = Exp(x)
            y = If(c) <
                then_branch = yes () => (float[4] a) { k = Exp(x) a = Neg(k) },
                else_branch = no () => (float[4] b) { l = Sin(x) m = Sin(x) b = Mul(l, m) }
            >
        }"""
    )
    result, _ = apply(proto, "simplify")
    assert node_count(result) == 5  # Exp, If, Neg, Sin, Mul
    for value in (True, False):
        assert_same(proto, result, {"c": np.array(value), "x": np.array([1, 2, 3, 4], np.float32)}, rtol=0)


def test_a_weight_is_hashed_once_and_a_new_one_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[object] = []
    real = sharing._digest
    monkeypatch.setattr(sharing, "_digest", lambda tensor: hashed.append(tensor) or real(tensor))
    v, w = np.repeat(np.float32([1, 2]), 32), np.ones(64, np.float32)
    model = model_io.load(build("(float[n, 64] x) => (float[n, 64] y) { a = Mul(x, v) y = Add(a, w) }", v=v, w=w))
    assert [sharing.deduplicate_initializers(model)[0] for _ in range(2)] == [0, 0]
    assert len(hashed) == 2
    set_constant(model.graph.initializers["w"], v)
    assert sharing.deduplicate_initializers(model) == (1, 256)
