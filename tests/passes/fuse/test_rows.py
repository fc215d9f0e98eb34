"""Products of a batch of one become Gemm where that takes fewer nodes, and compute the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import net, node, normal
from oracles import apply, assert_same, interface, operators

PASSES = "simplify,fold,fuse(opset=0)"
X = normal(1, 5, 8)
WEIGHTS = {
    **{f"w{k}": normal(8, 8) for k in range(4)},
    **{f"b{k}": normal(8) for k in range(4)},
    "g": normal(8), "t": normal(8), "row": normal(1, 1, 8), "rows": normal(1, 5, 8), "half": np.float32(0.5),
    "flat": np.array([1, -1, 8]), "heads": np.array([1, 5, 2, 4]), "square": np.array([1, 8, 5]),
    "one": np.array([1]), "two": np.array([2]), "last": np.array([-2]), "sizes": np.array([2, 3]),
    "zero": np.array([0]), "col": normal(8, 1),
}  # fmt: skip


def linear(k: int, source: str, result: str) -> list[onnx.NodeProto]:
    """A product and its bias, from one name to another."""
    return [node("MatMul", f"{source} w{k}", f"{result}_p"), node("Add", f"{result}_p b{k}", result)]


def build(
    *nodes: Any, outputs: tuple[str, ...] = ("y",), shape: tuple[Any, ...] = (1, 5, 8), opset: int = 17, **options: Any
) -> onnx.ModelProto:
    flat = [n for item in nodes for n in (item if isinstance(item, list) else [item])]
    return net(flat, {"x": shape}, WEIGHTS, outputs, opset=opset, **options)


def fused(model: onnx.ModelProto, x: np.ndarray = X) -> list[str]:
    result, _ = apply(model, PASSES)
    assert interface(result) == interface(apply(model, "")[0])
    assert_same(model, result, {"x": x}, 1e-5)
    again, _ = apply(result, PASSES)
    assert operators(again) == operators(result)
    return operators(result)


THREE = (linear(0, "x", "a"), node("Relu", "a", "c"), linear(1, "c", "d"), node("Tanh", "d", "e"), linear(2, "e", "y"))
GEMMS = ["Squeeze", "Gemm", "Relu", "Gemm", "Tanh", "Gemm", "Unsqueeze"]


@pytest.mark.parametrize("opset", [13, 17])
def test_products_in_a_row(opset: int) -> None:
    assert fused(build(*THREE, opset=opset)) == GEMMS


def test_the_number_of_rows_may_be_unknown() -> None:
    assert fused(build(*THREE, shape=(1, "n", 8))) == GEMMS


def test_as_many_nodes_are_no_reason() -> None:
    model = build(*THREE[:3], node("Tanh", "d"))
    assert fused(model) == operators(model)
    # What is given by, or read by, a node that needs the axis costs as much as an input or an output.
    model = build(node("CumSum", "x one", "s"), linear(0, "s", "a"), node("Relu", "a", "c"), linear(1, "c", "y"))
    assert fused(model) == operators(model)
    model = build(*THREE, node("CumSum", "c one", "z"), outputs=("y", "z"))
    assert fused(model) == operators(model)


@pytest.mark.parametrize("shape", [("n", 5, 8), (2, 5, 8), (None, 5, 8), (1, 2, 5, 8), (1, 8)])
def test_other_batches_stay(shape: tuple[Any, ...]) -> None:
    model = build(*THREE, shape=shape)
    x = normal(*(d if isinstance(d, int) else 2 for d in shape))
    result = fused(model, x)
    assert "Squeeze" not in result
    assert result == operators(model) or shape == (1, 8)  # which fold makes Gemm of


def test_an_operator_set_with_other_arguments_stays() -> None:
    model = build(*THREE, opset=12)
    assert fused(model) == operators(model)


def test_other_types_stay() -> None:
    weights = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in WEIGHTS.items()}
    model = net([n for item in THREE for n in (item if isinstance(item, list) else [item])], {"x": (1, 5, 8)}, weights)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    assert fused(model, X.astype(np.float64)) == operators(model)


INSIDE: dict[str, tuple[list[onnx.NodeProto], list[str]]] = {
    "normalization": ([node("LayerNormalization", "c g t", "m")], ["LayerNormalization"]),
    "normalization by position": ([node("LayerNormalization", "c g t", "m", axis=2)], ["LayerNormalization"]),
    "residual": ([node("Mul", "c a", "m")], ["Mul"]),
    "constant of the same rank": ([node("Max", "c row", "m")], ["Max"]),
    "constant of every position": ([node("Max", "rows c", "m")], ["Max"]),
    "constant vector": ([node("Max", "c g", "m")], ["Max"]),
    "softmax": ([node("Softmax", "c", "m", axis=1)], ["Softmax"]),
    "slice": ([node("Slice", "c zero two one", "m")], ["Slice"]),
    "slice from the end": ([node("Slice", "c zero two last", "m")], ["Slice"]),
    "concat": ([node("Concat", "c a rows", "m", axis=1)], ["Concat"]),
    "concat from the end": ([node("Concat", "c rows", "m", axis=-2)], ["Concat"]),
    "product and something else": ([node("MatMul", "c w3", "q"), node("Max", "q g", "m")], ["MatMul", "Max"]),
    "product with a computed matrix": (
        [node("Squeeze", "x zero", "p"), node("Gemm", "p p", "s", transA=1), node("MatMul", "c s", "m")],
        ["Gemm", "MatMul"],
    ),
    "split": (
        [node("Split", "c sizes", "q r", axis=1), node("Concat", "r q", "m", axis=1)], ["Split", "Concat"],
    ),
    "transpose": (
        [node("Transpose", "c", "q", perm=[0, 2, 1]), node("Softmax", "q", "r", axis=2),
         node("Transpose", "r", "m", perm=[0, 2, 1])], ["Transpose", "Softmax", "Transpose"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", INSIDE)
def test_what_stands_in_between_computes_on_matrices(what: str) -> None:
    middle, expected = INSIDE[what]
    model = build(*THREE[:2], middle, linear(1, "m", "d"), *THREE[3:])
    assert fused(model) == [*GEMMS[:3], *expected, *GEMMS[3:]]


def left_out(item: onnx.NodeProto, index: int) -> onnx.NodeProto:
    """``item`` without the result of this number."""
    item.output[index] = ""
    return item


OUTSIDE = {
    "normalization of the batch too": [node("LayerNormalization", "c g3 t3", "m", axis=0)],
    "softmax over the batch": [node("Softmax", "c", "m", axis=0)],
    "normalization with a result left out": [left_out(node("LayerNormalization", "c g t", "q s r"), 1),
                                             node("Mul", "q r", "m")],
    "numbers of another type": [node("Greater", "c half", "q"), node("Cast", "q", "r", to=TensorProto.FLOAT),
                                node("Mul", "r c", "m")],
    "exponents of another type": [node("Cast", "c", "q", to=TensorProto.INT64), node("Pow", "c q", "m")],
    "slice without axes": [node("Slice", "c zero one", "q"), node("Mul", "q c", "m")],
    "transpose of axes of size 1": [node("MatMul", "c col", "q"), node("Transpose", "q", "r", perm=[2, 1, 0]),
                                    node("Mul", "c r", "m")],
    "slice of the batch": [node("Slice", "c zero one zero", "q"), node("Mul", "q c", "m")],
    "concat of batches": [node("Concat", "c c", "q", axis=0), node("ReduceMax", "q", "m", axes=[0])],
    "transpose of the batch": [node("Transpose", "c", "q", perm=[2, 1, 0]), node("Exp", "q", "r"),
                               node("Transpose", "r", "m", perm=[2, 1, 0])],
    "product of computed tensors": [node("Transpose", "c", "q", perm=[0, 2, 1]), node("MatMul", "c q", "r"),
                                    node("MatMul", "r c", "m")],
    "stack of matrices": [node("MatMul", "c stack", "m")],
    "four axes": [node("Reshape", "c heads", "q"), node("Softmax", "q", "r", axis=2), node("Mul", "q r", "s"),
                  node("Reshape", "s flat", "m")],
}  # fmt: skip


@pytest.mark.parametrize("what", OUTSIDE)
def test_what_needs_the_axis_keeps_it(what: str) -> None:
    """Three products on each side pay for the axis that goes, comes back in between and goes again."""
    before = [linear(0, "x", "a"), node("Tanh", "a", "b"), linear(1, "b", "d"), node("Tanh", "d", "e")]
    behind = [linear(3, "m", "f"), node("Tanh", "f", "h"), linear(0, "h", "i"), node("Tanh", "i", "j")]
    model = build(*before, linear(2, "e", "c"), *OUTSIDE[what], *behind, linear(1, "j", "k"), node("Relu", "k"))
    arrays = {"g3": normal(1, 5, 8), "t3": normal(1, 5, 8), "stack": normal(1, 8, 8)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    result, _ = apply(model, "fuse(opset=0)")  # alone: simplify would take away what changes nothing for one sample
    assert_same(model, result, {"x": X}, 1e-5)
    assert operators(result).count("Gemm") == 6


def test_a_sum_behind_a_product_of_computed_tensors_is_no_bias() -> None:
    """Of as many rows as columns, so that the numbers that are added fit the second operand."""
    model = build(*THREE[:2], node("Mul", "c a", "q"), node("Add", "q b3", "r"), node("Tanh", "r", "m"),
                  linear(1, "m", "d"), *THREE[3:], shape=(1, 8, 8))  # fmt: skip
    assert fused(model, normal(1, 8, 8)) == [*GEMMS[:3], "Mul", "Add", "Tanh", *GEMMS[3:]]


@pytest.mark.parametrize("op", ["Add", "Concat"])
def test_large_constants_are_not_stored_twice(op: str) -> None:
    """Another node reads the constant with its axis."""
    inside = node(op, "c long", "m", **({"axis": 1} if op == "Concat" else {}))
    model = build(*THREE[:2], inside, linear(1, "m", "d"), *THREE[3:], node("Concat", "x long", "z", axis=1),
                  shape=(1, 150, 8), outputs=("y", "z"))  # fmt: skip
    model.graph.initializer.append(onnx.numpy_helper.from_array(normal(1, 150, 8), "long"))
    result, _ = apply(model, PASSES)
    assert sum(t.ByteSize() for t in result.graph.initializer) < sum(t.ByteSize() for t in model.graph.initializer)


def test_a_bias_that_keeps_its_axis_is_none_of_gemm() -> None:
    """It is too large to be stored a second time."""
    wide = [node("MatMul", "e wide", "p"), node("Add", "p long", "y"), node("Concat", "y long", "z", axis=1)]
    model = build(*THREE[:4], *wide, outputs=("y", "z"))
    for name, array in (("wide", normal(8, 1100)), ("long", normal(1, 1, 1100))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    assert fused(model).count("Gemm") in (0, 2)


def test_a_part_of_unknown_batch_keeps_its_axis() -> None:
    model = build(*THREE[:2], node("Concat", "c z", "m", axis=1), linear(1, "m", "d"), *THREE[3:])
    model.graph.input.append(onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, ("n", 5, 8)))
    result, _ = apply(model, PASSES)
    assert_same(model, result, {"x": X, "z": X}, 1e-5)


def test_a_view_of_two_unknown_sizes_reads_the_axis() -> None:
    """Its shape cannot be said in numbers."""
    view = [node("MatMul", "e col", "f"), node("Mul", "f z", "q"), node("Squeeze", "q zero", "r")]
    model = build(*THREE, node("Relu", "y", "s"), linear(3, "s", "u"), view, shape=(1, "n", 8), outputs=("u", "r"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, "m")))
    result, _ = apply(model, PASSES)
    assert_same(model, result, {"x": X, "z": normal(1, 3)}, 1e-5)
    assert operators(result).count("Gemm") == 4


def test_a_view_of_nothing_reads_the_axis() -> None:
    """A size of 0 in the shape would be that of the data."""
    nodes = [node("Slice", "e zero zero one", "q"), node("Reshape", "q turned", "r", allowzero=1)]
    model = build(*THREE, node("Relu", "y", "s"), linear(3, "s", "u"), nodes, outputs=("u", "r"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([8, 0]), "turned"))
    assert fused(model).count("Gemm") == 4


def test_a_tensor_that_is_read_on_both_sides_is_given_on_both() -> None:
    before = [linear(0, "x", "a"), node("Tanh", "a", "b"), linear(1, "b", "c")]
    model = build(*before, node("Relu", "c", "d"), linear(2, "d", "f"), node("Tanh", "f", "h"), linear(3, "h", "y"),
                  node("ReduceMax", "c", "z", axes=[0, 1], keepdims=0), outputs=("y", "z"))  # fmt: skip
    got = fused(model)
    assert (got.count("Gemm"), got.count("Squeeze"), got.count("Unsqueeze")) == (4, 1, 2)


def test_outputs_keep_their_axis() -> None:
    got = fused(build(*THREE, linear(3, "c", "z"), outputs=("y", "z", "c")))
    assert "Gemm" not in got  # as many axes to give back
    got = fused(build(*THREE, node("Exp", "d", "u"), linear(3, "u", "z"), outputs=("y", "z")))
    assert (got.count("Gemm"), got.count("Unsqueeze")) == (4, 2)


def test_a_reshape_beside_it_costs_nothing() -> None:
    middle = [node("Reshape", "c square", "q"), node("Softmax", "q", "r", axis=2), node("Reshape", "r flat", "m")]
    model = build(*THREE[:2], *middle, linear(1, "m", "d"), *THREE[3:])
    assert fused(model) == [*operators(model)[:6], "Gemm", "Tanh", "Gemm", "Unsqueeze"]
    model = build(node("Reshape", "x flat", "f"), linear(0, "f", "a"), node("Reshape", "a heads"), shape=(5, 1, 8))
    assert fused(model, normal(5, 1, 8)) == ["Reshape", "Gemm", "Reshape"]


def test_a_bias_per_position_is_none_of_gemm() -> None:
    model = build(*THREE)
    for item in model.graph.node:
        if item.op_type == "Add":
            item.input[1] = "rows"
    assert fused(model) == operators(model)


def test_a_product_that_is_read_without_its_bias_stays() -> None:
    model = build(*THREE, outputs=("y", "a_p", "d_p"))
    assert fused(model) == operators(model)


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_any_mixture(data: st.DataObject) -> None:
    """Whatever is mixed, the values stay, and a second application finds nothing more."""
    nodes: list[onnx.NodeProto] = []
    values = ["x"]
    for k in range(data.draw(st.integers(3, 9))):
        source = data.draw(st.sampled_from(values[-2:]))
        kind = data.draw(
            st.sampled_from(["linear", "linear", "Relu", "LayerNormalization", "Add", "Softmax", "view", "all"])
        )
        if kind == "linear":
            nodes += linear(k % 4, source, f"v{k}")
        elif kind == "LayerNormalization":
            nodes.append(node(kind, f"{source} g t", f"v{k}"))
        elif kind == "Add":
            nodes.append(
                node(kind, f"{source} {data.draw(st.sampled_from([*values, 'row', 'rows', 'half']))}", f"v{k}")
            )
        elif kind == "Softmax":
            nodes.append(node(kind, source, f"v{k}", axis=data.draw(st.sampled_from([0, 1, 2, -1]))))
        elif kind == "view":
            nodes += [node("Reshape", f"{source} heads", f"v{k}_h"), node("Tanh", f"v{k}_h", f"v{k}_t")]
            nodes.append(node("Reshape", f"v{k}_t flat", f"v{k}"))
        elif kind == "all":
            nodes.append(node("ReduceMax", source, f"v{k}_r", axes=[0, 1], keepdims=1))
            nodes.append(node("Sub", f"{source} v{k}_r", f"v{k}"))
        else:
            nodes.append(node(kind, source, f"v{k}"))
        values.append(f"v{k}")
    shown = data.draw(st.sets(st.sampled_from(values[1:]), max_size=2))
    model = build(nodes, outputs=tuple({values[-1]: None, **dict.fromkeys(sorted(shown))}))
    fused(model)
