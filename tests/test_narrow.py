"""Values broadcast too early are computed narrow, unless somebody would notice; lookups with counted indices go."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from oracles import apply, assert_same, operators


def build(
    body: str, opset: int = 17, inputs: str = "float[b, s, 4] x, bool[b, s] m", **weights: object
) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => (float[p, q, r] y) {{ {body} }}'
    )
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return proto


def check(proto: onnx.ModelProto, gone: set[str], b: int = 2, s: int = 3) -> list[str]:
    """Simplify; the operators of ``gone`` must be gone, the outputs the same bits."""
    result, _ = apply(proto, "simplify")
    rng = np.random.default_rng(0)
    for rows, columns in ((b, s), (1, 1), (3, 5)):
        x = rng.standard_normal((rows, columns, 4)).astype(np.float32)
        assert_same(proto, result, {"x": x, "m": rng.random((rows, columns)) < 0.5}, rtol=0)
    assert not gone & set(operators(result)), operators(result)
    assert not apply(result, "simplify")[1][0].stats
    return operators(result)


def test_expand_goes_through_a_chain_that_ends_in_something_as_large() -> None:
    body = """
        shape = Shape(x) row = Unsqueeze(m, two) wide = Expand(row, shape)
        n = Not(wide) f = Where(n, zero, low) y = Add(x, f)
    """
    proto = build(body, two=np.array([2]), zero=np.float32(0), low=np.float32(-9))
    assert check(proto, {"Expand", "Shape", "Not"}) == ["Unsqueeze", "Where", "Add"]


@pytest.mark.parametrize(
    "end",
    [
        "y = Softmax(f)",
        "c = CumSum(f, last) y = Add(x, c)",
        "t = Transpose<perm=[1, 0, 2]>(f) y = MatMul(t, u)",
        "y = Relu(f)",
    ],
)
def test_expand_stays_where_its_result_is_read_as_it_is(end: str) -> None:
    body = f"""
        shape = Shape(x) row = Unsqueeze(m, two) wide = Expand(row, shape)
        f = Where(wide, zero, low) {end}
    """
    weights = {"two": np.array([2]), "zero": np.float32(0), "low": np.float32(-9), "last": np.array(2)}
    proto = build(body, **weights, u=np.ones((4, 4), np.float32))
    assert "Expand" in check(proto, set())


def test_expand_stays_when_the_other_operand_is_smaller() -> None:
    body = "shape = Shape(x) row = Unsqueeze(m, two) wide = Expand(row, shape) f = Cast<to=1>(wide) y = Add(f, c)"
    proto = build(body, two=np.array([2]), c=np.ones((1, 1, 1), np.float32))
    assert "Expand" in check(proto, set())


def test_and_with_true_passes_on_the_narrow_mask() -> None:
    body = """
        shape = Shape(x) s = Gather(shape, one) r = Range(zero, s, one) row = Unsqueeze(r, zero1)
        column = Unsqueeze(r, two1) inside = GreaterOrEqual(column, zero)
        m3 = Unsqueeze(m, one1) both = And(inside, m3)
        f = Where(both, nought, low)
        t = Transpose<perm=[0, 2, 1]>(x) scores = MatMul(x, t) y = Add(scores, f)
    """
    proto = build(
        body, zero=np.array(0), one=np.array(1), zero1=np.array([0]), two1=np.array([0, 2]), one1=np.array([1]),
        nought=np.float32(0), low=np.float32(-9),
    )  # fmt: skip
    check(proto, {"And", "GreaterOrEqual", "Range", "Shape"})


def test_and_with_what_may_be_false_stays() -> None:
    body = """
        shape = Shape(x) s = Gather(shape, one) r = Range(zero, s, one)
        column = Unsqueeze(r, two1) inside = Greater(column, zero)
        m3 = Unsqueeze(m, one1) both = And(inside, m3) f = Where(both, nought, low)
        t = Transpose<perm=[0, 2, 1]>(x) scores = MatMul(x, t) y = Add(scores, f)
    """
    proto = build(
        body, zero=np.array(0), one=np.array(1), two1=np.array([0, 2]), one1=np.array([1]),
        nought=np.float32(0), low=np.float32(-9),
    )  # fmt: skip
    assert {"And", "Greater", "Range"} <= set(check(proto, set()))


def test_one_token_type_is_looked_up_once() -> None:
    body = """
        shape = Shape(m) types = ConstantOfShape<value=int64[1] {1}>(shape)
        row = Gather(table, types) y = Add(x, row)
    """
    proto = build(body, table=np.arange(12, dtype=np.float32).reshape(3, 4))
    assert check(proto, {"Gather", "Shape", "ConstantOfShape"}) == ["Add"]


def test_token_types_that_differ_are_looked_up() -> None:
    body = "k = Cast<to=7>(m) row = Gather(table, k) y = Add(x, row)"
    assert "Gather" in check(build(body, table=np.arange(12, dtype=np.float32).reshape(3, 4)), set())


COUNTED = """
    shape = Shape(m) b = Gather(shape, zero) s = Gather(shape, one)
    i = Range(zero, b, one) j = Range(zero, s, one)
"""
NUMBERS = {"zero": np.array(0), "one": np.array(1), "minus": np.array([-1]), "last": np.array([-1])}


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("start", [0, -1])
def test_mask_looked_up_by_counting_through_it(opset: int, start: int) -> None:
    body = (
        COUNTED.replace("j = Range(zero, s, one)", "k = Range(zero, s, one) j = Add(k, start)")
        + """
        i3 = Unsqueeze(i, far) j3 = Unsqueeze(j, near)
        all = Max(i3, j3) wide = Shape(all) iw = Expand(i3, wide) jw = Expand(j3, wide)
        i4 = Unsqueeze(iw, last) j4 = Unsqueeze(jw, last) ij = Concat<axis=-1>(i4, j4)
        found = GatherND(m, ij) f = Cast<to=1>(found) a = ReduceSum<keepdims=1>(x, last) y = Mul(a, f)
    """
    )
    proto = build(
        body, opset, start=np.array(start), far=np.array([1, 2]), near=np.array([0, 1]), **NUMBERS,
    )  # fmt: skip
    result, _ = apply(proto, "simplify")
    assert ("GatherND" in operators(result)) == bool(start)
    rng = np.random.default_rng(0)
    for rows, columns in ((2, 3), (1, 4), (3, 2)):
        x = rng.standard_normal((rows, 1, 4)).astype(np.float32)
        assert_same(proto, result, {"x": x, "m": rng.random((rows, columns)) < 0.5}, rtol=0)


def test_flat_mask_looked_up_by_row_times_length() -> None:
    body = (
        COUNTED
        + """
        flat = Reshape(m, minus) i3 = Unsqueeze(i, far) j3 = Unsqueeze(j, near)
        rows = Mul(i3, s) ij = Add(rows, j3) found = Gather(flat, ij) f = Cast<to=1>(found)
        a = ReduceSum<keepdims=1>(x, last) y = Mul(a, f)
    """
    )
    proto = build(body, far=np.array([1, 2]), near=np.array([0, 1]), **NUMBERS)
    result, _ = apply(proto, "simplify")
    assert not {"Gather", "Range", "Concat"} & set(operators(result))
    rng = np.random.default_rng(0)
    for rows, columns in ((2, 3), (1, 4), (3, 2)):
        x = rng.standard_normal((rows, 1, 4)).astype(np.float32)
        assert_same(proto, result, {"x": x, "m": rng.random((rows, columns)) < 0.5}, rtol=0)
    # Indices below zero count from the end: from -1 on, the mask is turned around.
    shifted = build(
        body.replace("found = Gather(flat, ij)", "back = Add(ij, minus) found = Gather(flat, back)"),
        far=np.array([1, 2]), near=np.array([0, 1]), **NUMBERS,
    )  # fmt: skip
    assert "Gather" in operators(apply(shifted, "simplify")[0])
    # Another row length than that of the mask is another lookup.
    other = build(body.replace("Mul(i3, s)", "Mul(i3, one)"), far=np.array([1, 2]), near=np.array([0, 1]), **NUMBERS)
    assert "Gather" in operators(apply(other, "simplify")[0])
