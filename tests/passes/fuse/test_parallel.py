"""Products of one value become one product where that takes fewer nodes, and compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import net, node, normal, weights
from oracles import apply, assert_same, operators

X = normal(2, 5, 8)


def products(
    outputs: tuple[int, ...] = (8, 4, 4),
    *,
    biased: tuple[bool, ...] = (True, True, True),
    heads: tuple[tuple[int, ...] | None, ...] = (None, None, None),
    opset: int = 17,
    shown: tuple[str, ...] = (),
) -> onnx.ModelProto:
    """x times one weight per entry of ``outputs``, with or without a bias and a Reshape behind it."""
    nodes, arrays, results = [], {}, []
    for k, (n, bias, shape) in enumerate(zip(outputs, biased, heads, strict=True)):
        arrays[f"w{k}"] = normal(8, n)
        nodes.append(node("MatMul", f"x w{k}", f"m{k}"))
        last = f"m{k}"
        if bias:
            arrays[f"b{k}"] = normal(n)
            nodes.append(node("Add", f"b{k} {last}" if k % 2 else f"{last} b{k}", f"a{k}"))
            last = f"a{k}"
        if shape is not None:
            arrays[f"s{k}"] = np.array(shape)
            nodes.append(node("Reshape", f"{last} s{k}", f"r{k}"))
            last = f"r{k}"
        nodes.append(node("Tanh", last, f"t{k}"))
        results.append(f"t{k}")
    return net(nodes, {"x": ("n", 5, 8)}, arrays, [*results, *shown], opset=opset)


def stored(model: onnx.ModelProto) -> int:
    return sum(array.nbytes for array in weights(model).values())


def fused(model: onnx.ModelProto) -> list[str]:
    result, _ = apply(model, "fuse")
    assert_same(model, result, {"x": X}, 1e-6)
    assert stored(result) <= stored(model) + 128
    again, _ = apply(result, "simplify,fold,fuse")
    assert operators(again) == operators(result)
    return [op for op in operators(result) if op != "Tanh"]


@pytest.mark.parametrize("opset", [12, 17])
def test_queries_keys_and_values(opset: int) -> None:
    assert fused(products(opset=opset)) == ["MatMul", "Add", "Split"]


def test_heads_are_cut_before_the_split() -> None:
    heads = ((0, 0, 4, 2), (0, 0, 2, 2), (0, 0, 2, 2))
    assert fused(products(heads=heads)) == ["MatMul", "Add", "Reshape", "Split"]
    other = ((0, 0, 4, 2), (0, 0, 1, 4), (0, 0, 2, 2))
    assert fused(products(heads=other)) == ["MatMul", "Add", "Split", "Reshape", "Reshape", "Reshape"]
    mixed = ((0, 10, 2, 2),) * 3
    assert fused(products((8, 8, 8), heads=mixed)) == ["MatMul", "Add", "Split", "Reshape", "Reshape", "Reshape"]
    one = ((0, 0, 4, 2), None, (0, 0, 2, 2))
    assert fused(products(heads=one)) == ["MatMul", "Add", "Split", "Reshape", "Reshape"]


def test_a_missing_bias_is_zero() -> None:
    assert fused(products(biased=(True, False, True))) == ["MatMul", "Add", "Split"]
    assert fused(products(biased=(False, False, False))) == ["MatMul", "Split"]


def test_nothing_to_gain() -> None:
    assert fused(products((8, 8), biased=(False, False), heads=(None, None))) == ["MatMul", "MatMul"]


def test_results_that_are_outputs_keep_their_names() -> None:
    assert fused(products(shown=("a0", "a2"))) == ["MatMul", "Add", "Split"]
    # The product before its bias is shown: it cannot disappear in the other.
    assert "Add" in fused(products(shown=("m1",)))


def test_weights_that_others_read_stay() -> None:
    model = products((8, 8, 8))
    model.graph.node[3].input[:] = ["t0", "w0"]
    assert fused(model).count("MatMul") == 3


def test_constants_per_position_are_no_bias() -> None:
    model = products()
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(normal(5, 8), "b0"))
    assert fused(model) == ["MatMul", "Add", "Split", "Add"]


@settings(max_examples=25, deadline=None)
@given(
    outputs=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=2, max_size=4),
    data=st.data(),
)
def test_any_combination(outputs: list[int], data: st.DataObject) -> None:
    biased = tuple(data.draw(st.booleans()) for _ in outputs)
    heads = tuple(data.draw(st.sampled_from([None, (0, 0, n, 1), (0, -1, 1, n)])) for n in outputs)
    model = products(tuple(outputs), biased=biased, heads=heads)
    before = [op for op in operators(model) if op != "Tanh"]
    assert len(fused(model)) <= len(before)


def test_a_merged_product_is_folded_into_the_one_in_front_of_it() -> None:
    nodes = [node("MatMul", "x w", "a")]
    for k, last in enumerate(("Relu", "Tanh")):
        nodes += [node("MatMul", f"a w{k}", f"m{k}"), node("Add", f"m{k} b{k}", f"a{k}"), node(last, f"a{k}", f"y{k}")]
    arrays = {"w": normal(8, 8), "w0": normal(8, 4), "w1": normal(8, 3), "b0": normal(4), "b1": normal(3)}
    model = net(nodes, {"x": ("n", 5, 8)}, arrays, ["y0", "y1"])
    assert fused(model) == ["MatMul", "Add", "Split", "Relu"]
