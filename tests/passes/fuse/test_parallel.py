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


@pytest.mark.parametrize("shape", [(2, 8, 8), (8,)])
def test_weights_that_are_no_matrices_stay(shape: tuple[int, ...]) -> None:
    model = products((8, 8, 8), biased=(False, False, False))
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(normal(*shape), tensor.name))
    assert fused(model) == ["MatMul"] * 3


@pytest.mark.parametrize("op", ["Sub", "Mul", "Max"])
def test_only_what_is_added_is_a_bias(op: str) -> None:
    model = products()
    for item in model.graph.node:
        item.op_type = op if item.op_type == "Add" else item.op_type
    assert fused(model) == ["MatMul", "Split", op, op, op]


def test_a_bias_in_a_branch_stays_there() -> None:
    """What is computed where the branch is taken only is no part of what is computed always."""
    model = products((8, 8, 8), biased=(False, False, False))
    del model.graph.output[:]
    shape = ("n", 5, 8)
    for k, item in enumerate([item for item in model.graph.node if item.op_type == "Tanh"]):
        (value,) = item.input
        branches = [
            onnx.helper.make_graph(
                [node(op, operands, f"{op}{k}")],
                op,
                [],
                [onnx.helper.make_tensor_value_info(f"{op}{k}", onnx.TensorProto.FLOAT, shape)],
            )
            for op, operands in (("Add", f"{value} b"), ("Neg", "x"))
        ]
        item.op_type, item.input[:] = "If", ["taken"]
        item.attribute.extend(
            onnx.helper.make_attribute(f"{name}_branch", graph)
            for name, graph in zip(("then", "else"), branches, strict=True)
        )
        model.graph.output.append(onnx.helper.make_tensor_value_info(item.output[0], onnx.TensorProto.FLOAT, shape))
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(8), "b"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("taken", onnx.TensorProto.BOOL, ()))
    result, _ = apply(model, "fuse")
    assert operators(result) == ["MatMul", "Split", "If", "If", "If"]
    for taken in (True, False):
        assert_same(model, result, {"x": X, "taken": np.array(taken)}, 1e-6)


def test_a_size_of_the_channels_is_not_cut_with_them() -> None:
    """Copied into the shape by a 0, it would be that of all products."""
    x = normal(8, 5, 8)
    model = products((8, 8, 8), heads=((5, 1, 0, 4, 2),) * 3)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    result, _ = apply(model, "fuse")
    assert_same(model, result, {"x": x}, 1e-6)


def test_a_size_of_zero_that_is_meant_stays() -> None:
    model = products(heads=((0, 7, 4, 2), (0, 7, 2, 2), (0, 7, 2, 2)))
    for item in model.graph.node:
        if item.op_type == "Reshape":
            item.attribute.append(onnx.helper.make_attribute("allowzero", 1))
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "s"
    result, _ = apply(model, "fuse")
    assert_same(model, result, {"x": normal(2, 0, 8)}, 1e-6)


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
