"""Linear operators in a row."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import fold, net, node, normal
from oracles import operators

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


def test_products_of_matrices_are_merged_when_that_has_no_more_weights() -> None:
    nodes = [node("MatMul", "x v", "p"), node("Add", "p a", "q"), node("MatMul", "q w", "r"), node("Add", "r b")]
    feeds = {"x": normal(2, 5, 6)}

    def through(width: int) -> list[str]:
        parts = {"v": normal(6, width), "a": normal(width), "w": normal(width, 6), "b": normal(6)}
        return operators(fold(net(nodes, {"x": [2, 5, 6]}, parts), feeds))

    assert through(8) == ["MatMul", "Add"]
    assert through(3) == ["MatMul", "Add"]
    assert through(2) == ["MatMul", "MatMul", "Add"]


@pytest.mark.parametrize(("size", "left"), [(1, ["Conv"]), (2, ["MatMul", "Mul", "Conv"])])
def test_ones_in_between_may_spread_the_data(size: int, left: list[str]) -> None:
    nodes = [node("MatMul", "v x", "p"), node("Mul", "p ones", "q"), node("Conv", "q w b")]
    parts = {"v": normal(2, 3), "ones": np.ones(size, np.float32), "w": normal(1, 2, 1), "b": normal(1)}
    assert operators(fold(net(nodes, {"x": [2, 3, 1]}, parts), {"x": normal(2, 3, 1)})) == left


def test_gemm_products_keep_all_their_factors() -> None:
    nodes = [
        node("Gemm", "x v a", "p", alpha=0.5, beta=3.0, transB=1), node("Gemm", "p w b", alpha=-2.0, beta=0.25),
    ]  # fmt: skip
    parts = {"v": normal(7, 4), "a": normal(7), "w": normal(7, 3), "b": normal(1, 3)}
    assert operators(fold(net(nodes, {"x": ["n", 4]}, parts), {"x": normal(5, 4)})) == ["Gemm"]
    # Transposed data: the rows of the first result are not the channels of the second.
    nodes[1] = node("Gemm", "p w b", transA=1)
    parts = {"v": normal(5, 4), "a": normal(5), "w": normal(5, 3), "b": normal(1, 3)}
    assert operators(fold(net(nodes, {"x": [5, 4]}, parts), {"x": normal(5, 4)})) == ["Gemm", "Gemm"]


@FEW
@given(st.data())
def test_a_pointwise_convolution_merges_with_any_before_it(data: st.DataObject) -> None:
    pick = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    op, group, inner, out = pick("Conv", "ConvTranspose"), pick(1, 2), pick(4, 8), pick(2, 4)
    group_behind = pick(1, 2)
    k = pick(1, 2, 3)
    attributes = {"strides": [pick(1, 2)], "pads": [pick(0, 1), 0], "dilations": [pick(1, 2)], "group": group}
    shape = (inner, 4 // group, k) if op == "Conv" else (4, inner // group, k)
    parts = {"v": normal(*shape), "w": normal(out, inner // group_behind, 1), "a": normal(inner), "b": normal(out)}
    nodes = [node(op, "x v a", "c", **attributes), node("Conv", "c w b", group=group_behind)]
    model = net(nodes, {"x": [2, 4, 9]}, parts)
    result = fold(model, {"x": normal(2, 4, 9)})
    merged = 4 * out // min(group, group_behind) * k
    enlarges = attributes["pads"][0] > attributes["dilations"][0] * (k - 1)
    fits = merged <= parts["v"].size + parts["w"].size and not enlarges
    assert operators(result) == ([op] if fits else [op, "Conv"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("op", "attributes"), [("Conv", {"pads": [1, 1]}), ("Conv", {}), ("ConvTranspose", {})])
def test_a_pointwise_convolution_merges_with_one_behind_unless_padding_sees_its_bias(
    op: str, attributes: dict[str, Any], bias: bool
) -> None:
    nodes = [node("Conv", "x v a" if bias else "x v", "c"), node(op, "c w b", **attributes)]
    parts = {"v": normal(8, 3, 1), "w": normal(8, 2, 3) if op == "ConvTranspose" else normal(2, 8, 3), "b": normal(2)}
    if bias:
        parts["a"] = normal(8)
    result = fold(net(nodes, {"x": [1, 3, 7]}, parts), {"x": normal(1, 3, 7)})
    exact = not bias or (op == "Conv" and not attributes)
    assert operators(result) == ([op] if exact else ["Conv", op])


def test_two_wide_kernels_and_strided_pointwise_ones_stay() -> None:
    feeds = {"x": normal(1, 3, 9)}
    wide = [node("Conv", "x v", "c"), node("Conv", "c w")]
    assert len(operators(fold(net(wide, {"x": [1, 3, 9]}, {"v": normal(9, 3, 2), "w": normal(1, 9, 2)}), feeds))) == 2
    strided = [node("Conv", "x v", "c", strides=[2]), node("Conv", "c w")]
    assert (
        len(operators(fold(net(strided, {"x": [1, 3, 9]}, {"v": normal(9, 3, 1), "w": normal(1, 9, 2)}), feeds))) == 2
    )
    behind = [node("Conv", "x v", "c"), node("Conv", "c w", strides=[2])]
    assert len(operators(fold(net(behind, {"x": [1, 3, 9]}, {"v": normal(9, 3, 2), "w": normal(1, 9, 1)}), feeds))) == 2


def test_a_padded_pointwise_convolution_stays() -> None:
    nodes = [node("Conv", "x v", "c"), node("Conv", "c w", pads=[1, 0])]
    model = net(nodes, {"x": [1, 3, 9]}, {"v": normal(9, 3, 2), "w": normal(1, 9, 1)})
    assert operators(fold(model, {"x": normal(1, 3, 9)})) == ["Conv", "Conv"]


def test_a_product_that_turns_rows_into_columns_is_no_pointwise_one() -> None:
    nodes = [node("Gemm", "v x", "p"), node("Gemm", "p w b", transA=1)]
    model = net(nodes, {"x": [4, 3]}, {"v": normal(6, 4), "w": normal(6, 5), "b": normal(5)})
    assert operators(fold(model, {"x": normal(4, 3)})) == ["Gemm"]
    for product in model.graph.node:
        product.attribute.append(helper.make_attribute("alpha", 0.5))
    assert operators(fold(model, {"x": normal(4, 3)})) == ["Gemm"]


def test_a_result_in_between_that_others_read_keeps_the_pair() -> None:
    nodes = [node("MatMul", "x v", "p"), node("MatMul", "p w", "y"), node("Relu", "p", "z")]
    parts = {"v": normal(4, 8), "w": normal(8, 4)}
    model = net(nodes, {"x": [2, 3, 4]}, parts, ("y", "z"))
    assert operators(fold(model, {"x": normal(2, 3, 4)})).count("MatMul") == 2
    offset = [nodes[0], node("Add", "p a", "q"), node("MatMul", "q w"), nodes[2]]
    model = net(offset, {"x": [2, 3, 4]}, {**parts, "a": normal(8)}, ("y", "z"))
    assert operators(fold(model, {"x": normal(2, 3, 4)})).count("MatMul") == 2
    output = net(nodes[:2], {"x": [2, 3, 4]}, parts, ("y", "p"))
    assert operators(fold(output, {"x": normal(2, 3, 4)})).count("MatMul") == 2


def test_what_stands_between_two_products_is_part_of_theirs() -> None:
    nodes = [node("MatMul", "x v", "p"), node("Add", "p a", "q"), node("MatMul", "q w")]
    parts = {"v": normal(6, 8), "a": normal(8), "w": normal(8, 2)}
    assert operators(fold(net(nodes, {"x": [2, 5, 6]}, parts), {"x": normal(2, 5, 6)})) == ["MatMul", "Add"]
    parts["a"] = normal(5, 1)  # one offset per position: no bias
    assert operators(fold(net(nodes, {"x": [2, 5, 6]}, parts), {"x": normal(2, 5, 6)})) == ["MatMul", "Add", "MatMul"]


def test_a_scale_that_no_weight_could_take_keeps_the_pair() -> None:
    """The weights are too large to be copied; their product would be small, but without the scale."""
    nodes = [
        node("MatMul", "x v", "p"),
        node("Mul", "p k", "q"),
        node("MatMul", "q w"),
        node("MatMul", "u v", "r"),
        node("Tanh", "r", "s"),
        node("MatMul", "s w", "z"),
        node("Pow", "s k", "t"),
    ]
    parts = {"v": normal(4, 64), "k": normal(64), "w": normal(64, 1)}
    model = net(nodes, {"x": [2, 3, 4], "u": [2, 3, 4]}, parts, ("y", "z", "t"))
    feeds = {"x": normal(2, 3, 4), "u": normal(2, 3, 4)}
    assert operators(fold(model, feeds)).count("MatMul") == 4


def test_a_stack_of_matrices_is_no_factor() -> None:
    nodes = [node("MatMul", "x v", "p"), node("MatMul", "p w")]
    for v, w in (((2, 4, 8), (8, 4)), ((4, 8), (2, 8, 4))):
        model = net(nodes, {"x": [2, 3, 4]}, {"v": normal(*v), "w": normal(*w)})
        assert operators(fold(model, {"x": normal(2, 3, 4)})) == ["MatMul", "MatMul"]


def test_a_bias_of_run_time_keeps_the_pair() -> None:
    nodes = [node("Conv", "x v a", "p"), node("Conv", "p w b")]
    for name, size in (("a", 8), ("b", 2)):
        biases = {"a": normal(8), "b": normal(2)}
        parts = {"v": normal(8, 3, 3), "w": normal(2, 8, 1), **{n: b for n, b in biases.items() if n != name}}
        model = net(nodes, {"x": [1, 3, 7], name: [size]}, parts)
        assert operators(fold(model, {"x": normal(1, 3, 7), name: biases[name]})) == ["Conv", "Conv"]
