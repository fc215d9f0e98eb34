"""What simplify says of sizes and integers is what the runtime makes of them, in odd cases too."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from oracles import apply, assert_same, operators
from test_simplify import build, feeds

FAR = 2**63 - 1
SIZES: list[tuple[str, str, dict[str, Any]]] = [
    # A window that is larger than its input has a place all the same.
    ("float[1,1,2,2] x", "y = MaxPool<kernel_shape=[3,2], strides=[2,1]>(x)", {}),
    ("float[1,1,2,2] x", "y = AveragePool<kernel_shape=[3,3], strides=[2,2]>(x)", {}),
    # What is cut away from a transposed convolution is never less than nothing.
    ("float[1,1,3] x", 'y = ConvTranspose<strides=[2], auto_pad="SAME_UPPER">(x, w)', {"w": np.ones((1, 1, 1))}),
    ("float[1,1,n] x", 'y = ConvTranspose<strides=[2], auto_pad="SAME_LOWER">(x, w)', {"w": np.ones((1, 1, 3))}),
    (
        "float[1,2,3] x",
        'y = ConvTranspose<strides=[3], group=2, auto_pad="SAME_LOWER">(x, w)',
        {"w": np.ones((2, 3, 2))},
    ),
    ("float[1,1,9] x", 'y = MaxPool<kernel_shape=[3], strides=[2], dilations=[2], auto_pad="SAME_UPPER">(x)', {}),
    # A slice that counts down begins with an element, wherever it is told to.
    ("float[3] x", "y = Slice(x, a, b, c, a)", {"a": [-1], "b": [FAR], "c": [0]}),
    ("float[n] x", "y = Slice(x, a, b, c, a)", {"a": [-1], "b": [2**31 - 1], "c": [0]}),
    ("float[5] x", "y = Slice(x, a, b, c, d)", {"a": [-10], "b": [-100], "c": [0], "d": [-1]}),
    ("float[5] x", "y = Slice(x, a, b, c, d)", {"a": [9], "b": [1], "c": [0], "d": [-2]}),
    ("float[n] x", "y = Slice(x, a, b, c, a)", {"a": [-1], "b": [FAR], "c": [0], "n": 0}),
    # Of one number NonZero makes one row.
    ("float x", "y = NonZero(x)", {}),
]


@pytest.mark.parametrize(("inputs", "node", "given"), SIZES, ids=[f"{node}: {inputs}" for inputs, node, _ in SIZES])
def test_sizes_are_what_the_runtime_makes_of_them(inputs: str, node: str, given: dict[str, Any]) -> None:
    weights = {k: np.array(v, np.float32 if k == "w" else np.int64) for k, v in given.items() if not isinstance(v, int)}
    sizes = {k: v for k, v in given.items() if isinstance(v, int)}
    tail = "s = Shape(y) size = Add(s, z) t = Shape<start=0, end=1>(y) first = Add(t, z)"
    proto = build(f"({inputs}, int64[1] z) => (int64[r] size, int64[1] first) {{ {node} {tail} }}", **weights)
    result, _ = apply(proto, "simplify")
    feed = feeds(proto, 0, **sizes) | {"z": np.zeros(1, np.int64)}
    assert_same(proto, result, feed, rtol=0)


def test_a_slice_with_nothing_left_is_empty() -> None:
    text = "s = Shape(x) e = Slice(s, a, b) t = Concat<axis=0>(s, e) y = Reshape(x, t)"
    proto = build(f"(float[n,m] x) => (float[n,m] y) {{ {text} }}", a=np.array([2]), b=np.array([FAR]))
    result, _ = apply(proto, "simplify")
    assert_same(proto, result, feeds(proto, 0), rtol=0)


def test_parts_without_elements_say_nothing_about_the_other_axes() -> None:
    proto = build(
        """(float[m,k] e, float[n,p] x, int64[1] z) => (int64[1] o) {
            y = Concat<axis=0>(e, x) s = Shape<start=1, end=2>(y) u = Shape<start=1, end=2>(e) d = Sub(s, u)
            o = Add(d, z) }"""
    )
    result, _ = apply(proto, "simplify")
    assert_same(proto, result, feeds(proto, 0, m=0, k=5, n=2, p=3) | {"z": np.zeros(1, np.int64)}, rtol=0)


WRAPPED: list[tuple[str, dict[str, np.ndarray]]] = [
    ("c = Add(w, one) l = Greater(c, zero)", {"w": np.array([0, 2**31 - 1, 5], np.int32)}),
    ("c = Cast<to=6>(w) l = GreaterOrEqual(c, zero)", {"w": np.array([0, 2**31, 2**32])}),
    ("r = Range(zero0, n, one0) c = Mul(r, w) l = GreaterOrEqual(c, zero)", {"w": np.array([2**30], np.int32)}),
    ("c = LessOrEqual(w, k) l = Identity(c)", {"w": np.array([-1, FAR] * 150), "k": np.array([0])}),
    ("t = Shape(x) c = Add(t, w) l = Greater(c, k)", {"w": np.array([FAR]), "k": np.array([0])}),
]


@pytest.mark.parametrize(("text", "weights"), WRAPPED, ids=[text for text, _ in WRAPPED])
def test_numbers_that_wrap_around_are_not_foreseen(text: str, weights: dict[str, np.ndarray]) -> None:
    numbers = {"one": [1], "zero": [0], "one0": 1, "zero0": 0}
    weights |= {name: np.array(number, np.int32) for name, number in numbers.items()}
    text = f"s = Size(x) n = Cast<to=6>(s) {text} a = And(m, l) o = Not(a)"
    mask = np.ones(max(len(weights["w"]), 3), bool)
    proto = build(f"(float[d] x, bool[{len(mask)}] m) => (bool[{len(mask)}] o) {{ {text} }}", **weights)
    result, _ = apply(proto, "simplify")
    assert_same(proto, result, {"x": np.zeros(3, np.float32), "m": mask}, rtol=0)


def test_operator_sets_without_shapes_as_inputs_are_left_alone() -> None:
    text = "y = Flatten<axis=1>(x) w = Reshape<shape=[4, 6]>(y) o = Transpose<perm=[1, 0]>(w)"
    proto = build(f"(float[2,3,4] x) => (float[6,4] o) {{ {text} }}", 4)
    result, (outcome,) = apply(proto, "simplify")
    assert operators(result) == ["Flatten", "Reshape", "Transpose"]
    assert "below 5" in outcome.skipped[0].reason


@pytest.mark.parametrize("kind", [1, 11])
@pytest.mark.parametrize("size", ["n", "5"])
def test_half_of_a_size_is_no_whole_number(kind: int, size: str) -> None:
    text = f"""
        s = Shape(x) f = Cast<to={kind}>(s) k = Cast<to={kind}>(two) q = Div(f, k)
        floor = Floor(q) ceil = Ceil(q) round = Round(q) even = Equal(q, floor) whole = Cast<to=6>(q)
        a = Cast<to=6>(floor) b = Cast<to=6>(ceil) p = Concat<axis=0>(a, b) wide = Cast<to=7>(p) y = Pad(x, wide)"""
    outputs = f"float[m] y, bool[1] even, {'float' if kind == 1 else 'double'}[1] round, int32[1] whole"
    proto = build(f"(float[{size}] x) => ({outputs}) {{ {text} }}", two=np.array([2], np.float32))
    result, _ = apply(proto, "simplify")
    for n in (5,) if size == "5" else (4, 5, 6, 7):
        assert_same(proto, result, feeds(proto, 0, n=n), rtol=0)
