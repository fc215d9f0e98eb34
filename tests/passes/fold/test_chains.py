"""Runs of elementwise nodes, and the constants that ONNX Runtime wants to see."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import fold, net, node, normal
from oracles import apply, assert_same, operators

from onnxslim import model as model_io
from onnxslim import runtime


def chain(text: str, parts: dict[str, np.ndarray], shape: Sequence[Any] = (2, 3)) -> onnx.ModelProto:
    """``chain("Mul a;Add b", ...)``: each node applied to the result of the one before."""
    nodes, at = [], "x"
    steps = text.split(";")
    for k, step in enumerate(steps):
        op, *constants = step.split()
        result = "y" if k == len(steps) - 1 else f"v{k}"
        nodes.append(node(op, " ".join([at, *constants]), result))
        at = result
    return net(nodes, {"x": shape}, parts)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Mul a;Mul b", ["Mul"]),
        ("Mul a;Div b;Div a", ["Mul"]),
        ("Add a;Sub b", ["Add"]),
        ("Add a;Mul b;Add a;Mul b", ["Mul", "Add"]),
        ("Mul a;Add b", ["Mul", "Add"]),
        ("Neg;Neg;Mul a", ["Mul"]),
        ("Add a;Relu;Add b", ["Add", "Relu", "Add"]),
    ],
)
def test_runs_of_elementwise_nodes_are_shortened(text: str, left: list[str]) -> None:
    used = {name: normal(3) + 3 for name in "ab" if f" {name}" in text}
    assert operators(fold(chain(text, used), {"x": normal(2, 3)})) == left


def test_constants_that_outweigh_their_product_stay() -> None:
    parts = {"a": normal(100, 1), "b": normal(100)}
    model = chain("Mul a;Mul b", parts, (100, 100))
    assert operators(fold(model, {"x": normal(100, 100)})) == ["Mul", "Mul"]


def test_a_run_that_changes_the_shape_keeps_a_node_for_it() -> None:
    parts = {"a": np.full((3, 1), 2, np.float32), "b": np.full((1,), 0.5, np.float32)}
    # The product is 1 everywhere, but somebody has to make three rows out of one.
    assert len(operators(fold(chain("Relu;Mul a;Mul b;Relu", parts, (1, 4)), {"x": normal(1, 4)}))) > 2
    parts["a"] = np.float32(2)
    assert operators(fold(chain("Relu;Mul a;Mul b;Sigmoid", parts, (1, 4)), {"x": normal(1, 4)})) == ["Relu", "Sigmoid"]


def test_adding_and_subtracting_a_large_number_rounds_on_purpose() -> None:
    model = chain("Abs;Add a;Sub a;Abs", {"a": np.float32(1.5 * 2**23)})
    assert operators(fold(model, {"x": normal(2, 3) * 10})) == ["Abs", "Add", "Sub", "Abs"]
    parts = {"a": np.float32(1.5 * 2**23), "c": np.float32(0.3), "h": np.float32(3)}
    for text in ("Add c;Add a;Sub a", "Add a;Sub a;Add c", "Mul h;Add c;Add a;Sub a;Add c;Mul h"):
        steps = [step.split()[0] for step in text.split(";")]
        assert operators(fold(chain(text, {k: v for k, v in parts.items() if k in text}), {"x": normal(2, 3)})) == steps
    model = chain("Abs;Add a;Sub a;Sigmoid", {"a": np.float32(15)})
    assert operators(fold(model, {"x": normal(2, 3) * 10})) == ["Abs", "Sigmoid"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-4, 4), min_size=2, max_size=4))
def test_factors_that_would_become_subnormal_stay(exponents: list[float]) -> None:
    """No factor leaves the normal range of float16, nor does a value; a product of the factors may."""
    factors, size = [], 3.0
    for exponent in exponents:
        if -4 < size + exponent < 4:
            factors.append(np.float16(10**exponent))
            size += exponent
    assume(factors)
    steps = [node("Mul", f"v{k} k{k}", f"v{k + 1}") for k in range(len(factors))]
    parts = {f"k{k}": factor for k, factor in enumerate(factors)}
    model = net(steps, {"v0": [3]}, parts, (f"v{len(factors)}",), dtype=TensorProto.FLOAT16)
    feeds = {"v0": np.array([1000, 2000, 3000], np.float16)}
    assert_same(model, apply(model, "fold")[0], feeds, rtol=5e-3)


def test_integers_are_left_alone() -> None:
    nodes = [node("Div", "x a", "m"), node("Mul", "m a")]
    model = net(nodes, {"x": [5]}, {"a": np.int64(2)}, dtype=TensorProto.INT64)
    assert operators(fold(model, {"x": np.arange(5)})) == ["Div", "Mul"]


def test_division_by_the_data_or_by_zero_is_left_alone() -> None:
    feeds, parts = {"x": np.abs(normal(1, 4, 5)) + 1}, {"w": np.abs(normal(3, 4, 1)), "k": np.abs(normal(3, 1))}
    by_data = net([node("Conv", "x w", "c"), node("Div", "k c")], {"x": [1, 4, 5]}, parts)
    assert operators(fold(by_data, feeds)) == ["Conv", "Div"]
    parts["k"][1] = 0
    by_zero = net([node("Conv", "x w", "c"), node("Div", "c k")], {"x": [1, 4, 5]}, parts)
    assert operators(fold(by_zero, feeds)) == ["Conv", "Div"]


def test_values_read_in_between_stay() -> None:
    nodes = [node("Mul", "x a", "m"), node("Mul", "m b", "y")]
    model = net(nodes, {"x": [2, 3]}, {"a": normal(3), "b": normal(3)}, ("y", "m"))
    assert operators(fold(model, {"x": normal(2, 3)})) == ["Mul", "Mul"]


def kernels(model: onnx.ModelProto) -> set[str]:
    return {n.op_type for n in runtime.optimized(model_io.load(model), threads=1).graph}


def test_the_constants_of_a_gelu_stay() -> None:
    nodes = [
        node("MatMul", "x v", "p"), node("Add", "p a", "h"), node("Div", "h r", "d"), node("Erf", "d", "e"),
        node("Add", "e one", "f"), node("Mul", "h f", "g"), node("Mul", "g half", "i"), node("MatMul", "i w"),
    ]  # fmt: skip
    parts = {
        "v": normal(4, 8), "a": normal(8), "r": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5),
        "w": normal(8, 4),
    }  # fmt: skip
    model = net(nodes, {"x": [2, 5, 4]}, parts)
    result = fold(model, {"x": normal(2, 5, 4)})
    assert kernels(model) & {"Gelu", "BiasGelu"}
    assert kernels(result) == kernels(model)


@pytest.mark.parametrize("form", ["Div", "Reciprocal"])
def test_the_constants_of_a_layer_normalization_stay(form: str) -> None:
    norm = (
        [node("Div", "d s", "n")]
        if form == "Div"
        else [node("Reciprocal", "s", "q"), node("Mul", "d q", "n")]
    )  # fmt: skip
    nodes = [
        node("ReduceMean", "x", "u", axes=[-1]), node("Sub", "x u", "d"), node("Pow", "d two", "p"),
        node("ReduceMean", "p", "t", axes=[-1]), node("Add", "t eps", "e"), node("Sqrt", "e", "s"), *norm,
        node("Mul", "n g", "m"), node("Add", "m b", "o"), node("MatMul", "o w", "c"), node("Add", "c a"),
    ]  # fmt: skip
    parts = {
        "two": np.float32(2), "eps": np.float32(1e-5), "g": normal(8), "b": normal(8), "w": normal(8, 4),
        "a": normal(4),
    }  # fmt: skip
    model = net(nodes, {"x": [2, 5, 8]}, parts)
    result = fold(model, {"x": normal(2, 5, 8)})
    assert kernels(result) == kernels(model)
    assert len(result.graph.node) == len(nodes)
    if form == "Div":
        assert "LayerNormalization" in kernels(result)


def test_a_run_that_adds_an_axis_keeps_a_node_for_it() -> None:
    parts = {"a": np.full((1, 1), 2, np.float32), "b": np.full((), 0.5, np.float32)}
    model = chain("Mul a;Mul b", parts, (3,))
    assert len(operators(fold(model, {"x": normal(3)}))) == 1
    ones = chain("Relu;Mul a;Mul b;Sigmoid", parts, (3,))
    assert len(operators(fold(ones, {"x": normal(3)}))) > 2
    unknown = chain("Mul a;Mul b", {**parts, "a": np.full((1,), 2, np.float32)}, None)  # type: ignore[arg-type]
    assert len(operators(fold(unknown, {"x": np.array(3, np.float32)}))) == 1


def test_a_difference_from_a_constant_turns_the_data_round() -> None:
    nodes, parts = (
        [node("Sub", "a x", "m"), node("Mul", "m b", "n"), node("Add", "n a")],
        {"a": normal(3), "b": normal(3)},
    )
    assert operators(fold(net(nodes, {"x": [2, 3]}, parts), {"x": normal(2, 3)})) == ["Mul", "Add"]
    twice = [nodes[0], node("Sub", "b m")]
    assert operators(fold(net(twice, {"x": [2, 3]}, parts), {"x": normal(2, 3)})) == ["Add"]


def test_integers_are_no_affine_maps_of_floats() -> None:
    nodes = [node("Neg", "x", "n"), node("Abs", "n")]
    model = net(nodes, {"x": (3,)}, {}, dtype=TensorProto.INT64)
    assert operators(fold(model, {"x": np.array([1, -2, 3])})) == ["Neg", "Abs"]


def test_division_by_zero_is_no_affine_map() -> None:
    parts = {"a": np.array([1, 0, 2], np.float32), "b": normal(3)}
    assert operators(fold(chain("Div a;Mul b", parts), {"x": normal(2, 3)})) == ["Div", "Mul"]
