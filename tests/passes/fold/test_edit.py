"""Weights that others use, the size of the file, and number formats."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim.graph import add_constant, set_constant
from onnxslim.passes.fold import edit

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import BN, batchnorm, fold, net, node, normal, reasons, weights
from oracles import apply, assert_same, operators
from strategies import Case


def twins(same: bool, size: int) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Two convolutions with one weight, each with a BatchNormalization."""
    other = BN if same else "2scale 2shift 2mean 2var"
    nodes = [
        node("Conv", "x w", "c"),
        node("BatchNormalization", f"c {BN}", "y"),
        node("Conv", "z w", "d"),
        node("BatchNormalization", f"d {other}", "v"),
    ]
    parts = {"w": normal(3, size, 3), **batchnorm(3), **({} if same else batchnorm(3, "2"))}
    model = net(nodes, {"x": [1, size, 9], "z": [1, size, 7]}, parts, ("y", "v"))
    return model, {"x": normal(1, size, 9), "z": normal(1, size, 7)}


def test_a_shared_weight_is_folded_once_when_all_users_agree() -> None:
    model, feeds = twins(same=True, size=50)
    result = fold(model, feeds)
    assert operators(result) == ["Conv", "Conv"]
    assert len({n.input[1] for n in result.graph.node}) == 1


def test_a_shared_weight_is_copied_only_when_the_file_does_not_grow() -> None:
    model, feeds = twins(same=False, size=50)
    assert operators(fold(model, feeds)).count("BatchNormalization") == 2
    assert "2 uses" in reasons(model)[0]
    small, feeds = twins(same=False, size=1)
    result = fold(small, feeds)
    assert operators(result) == ["Conv", "Conv"]
    assert result.ByteSize() <= apply(small, "")[0].ByteSize()


@pytest.mark.parametrize(("size", "stays"), [(50, True), (1, False)])
def test_a_weight_shared_with_a_user_that_does_not_change(size: int, stays: bool) -> None:
    model, feeds = twins(same=True, size=size)
    model.graph.node[3].CopyFrom(node("Relu", "d", "v"))
    assert ("BatchNormalization" in operators(fold(model, feeds))) is stays


def test_a_weight_that_is_a_graph_output_keeps_its_content() -> None:
    model = net(
        [node("Conv", "x w", "c"), node("Mul", "c k")],
        {"x": [1, 9, 4]},
        {"w": normal(3, 9, 3), "k": normal(3, 1)},
        {"y": [1, 3, 2], "w": [3, 9, 3]},
    )
    assert operators(fold(model, {"x": normal(1, 9, 4)})) == ["Conv", "Mul"]


def test_savings_elsewhere_do_not_pay_for_the_copy_of_a_weight() -> None:
    model, feeds = twins(same=False, size=9)  # a copy would cost a little more than what disappears
    nodes = [node("Mul", "y k", "t"), node("Mul", "t l", "u")]  # these two become one, which saves more than that
    model.graph.node.extend(nodes)
    model.graph.output[0].name = "u"
    for name in "kl":
        model.graph.initializer.append(numpy_helper.from_array(normal(3, 7), name))
    result = fold(model, feeds)
    assert operators(result).count("BatchNormalization") == 2


def test_a_bias_is_paid_for_by_savings_elsewhere() -> None:
    nodes = [node("Conv", "x w", "c"), node("Add", "c k", "d"), node("Relu", "d", "r"), node("Conv", "r v", "e")]
    parts = {"w": normal(60, 2, 1), "k": np.float32(3), "v": normal(90, 60, 2), "l": normal(90, 1)}
    model = net([*nodes, node("Mul", "e l")], {"x": [1, 2, 5]}, parts)
    assert operators(fold(model, {"x": normal(1, 2, 5)})) == ["Conv", "Relu", "Conv"]
    parts.pop("l")
    alone = net([*nodes, node("Relu", "e")], {"x": [1, 2, 5]}, parts)
    assert operators(fold(alone, {"x": normal(1, 2, 5)})) == ["Conv", "Add", "Relu", "Conv", "Relu"]


def test_a_constant_is_weight_and_offset_at_once() -> None:
    nodes = [node("MatMul", "x w", "m"), node("Mul", "m k", "n"), node("Add", "n w")]
    model = net(nodes, {"x": [2, 3, 1]}, {"w": normal(1, 4), "k": normal(4)})
    assert operators(fold(model, {"x": normal(2, 3, 1)})) == ["MatMul", "Add"]


def test_the_factors_of_gemm_scale_what_an_offset_becomes() -> None:
    nodes = [node("Add", "x a", "m"), node("Gemm", "m w b", alpha=0.5, beta=3.0, transB=1)]
    model = net(nodes, {"x": [2, 3]}, {"w": normal(4, 3), "a": normal(3), "b": normal(4)})
    assert operators(fold(model, {"x": normal(2, 3)})) == ["Gemm"]


def test_a_constant_that_others_read_keeps_its_content() -> None:
    nodes = [node("Conv", "x w b", "c"), node("Mul", "c k", "y"), node("Add", "z b", "v")]
    model = net(
        nodes, {"x": [1, 4, 5], "z": [2, 3]}, {"w": normal(3, 4, 1), "b": normal(3), "k": normal(3, 1)}, ("y", "v")
    )
    fold(model, {"x": normal(1, 4, 5), "z": normal(2, 3)})


def test_a_bias_that_would_outweigh_the_node_is_not_made() -> None:
    nodes = [node("Conv", "x w", "c"), node("Add", "c k")]
    model = net(nodes, {"x": [1, 2, 5]}, {"w": normal(900, 2, 1), "k": np.float32(3)})
    assert operators(fold(model, {"x": normal(1, 2, 5)})) == ["Conv", "Add"]
    assert "larger" in reasons(model)[0]


def branches(body: Callable[[str], list[onnx.NodeProto]], outer: list[onnx.NodeProto], **parts: np.ndarray) -> Case:
    declared = {k: helper.make_tensor_value_info(f"{k}_y", TensorProto.FLOAT, None) for k in ("then", "else")}
    graphs = {k: helper.make_graph(body(k), k, [], [v]) for k, v in declared.items()}
    nodes = [
        *outer,
        node("ReduceMax", "x", "top", keepdims=0),
        node("Greater", "top zero", "flag"),
        node("If", "flag", "y", then_branch=graphs["then"], else_branch=graphs["else"]),
    ]
    model = net(nodes, {"x": [1, 4, 5]}, {"zero": np.float32(0), **parts})
    return Case((model, {"x": normal(1, 4, 5)}))


def test_a_value_captured_by_a_branch_is_not_folded_through() -> None:
    model, feeds = branches(
        lambda k: [node("Mul", "c k", f"{k}_y")] if k == "then" else [node("Neg", "x", f"{k}_y")],
        [node("Conv", "x w", "c")],
        w=normal(4, 4, 1), k=normal(4, 1),
    )  # fmt: skip
    result = fold(model, feeds)
    bodies = [a.g for n in result.graph.node if n.op_type == "If" for a in n.attribute]
    assert sorted(n.op_type for body in bodies for n in body.node) == ["Mul", "Neg"]


def test_runs_do_not_reach_into_a_branch() -> None:
    model, feeds = branches(
        lambda k: [node("Mul", "m k", f"{k}_y")] if k == "then" else [node("Neg", "x", f"{k}_y")],
        [node("Mul", "x k", "m")],
        k=normal(4, 1),
    )
    result = fold(model, feeds)
    # What is computed once stays outside: the body may be that of a Loop.
    assert operators(result)[0] == "Mul"
    bodies = [a.g for n in result.graph.node if n.op_type == "If" for a in n.attribute]
    assert sorted(n.op_type for body in bodies for n in body.node) == ["Mul", "Neg"]


def test_a_convolution_inside_a_branch_is_folded() -> None:
    model, feeds = branches(
        lambda k: [node("Conv", f"x {k}_w", f"{k}_c"), node("Mul", f"{k}_c k", f"{k}_y")],
        [],
        then_w=normal(4, 4, 1), else_w=normal(4, 4, 1), k=normal(4, 1),
    )  # fmt: skip
    result = fold(model, feeds)
    bodies = [a.g for n in result.graph.node if n.op_type == "If" for a in n.attribute]
    assert [n.op_type for body in bodies for n in body.node] == ["Conv", "Conv"]


def half(scale: float, weight: float) -> onnx.ModelProto:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k")]
    parts = {"w": (weight * normal(3, 4, 1)).astype(np.float16), "k": np.float16(scale)}
    return net(nodes, {"x": [1, 4, 5]}, parts, dtype=TensorProto.FLOAT16)


def test_a_bias_outside_the_range_of_float16_is_not_made() -> None:
    model = half(1000, 0.01)
    model.graph.node[0].input.append("b")
    model.graph.initializer.append(numpy_helper.from_array(np.full(3, 1000, np.float16), "b"))
    assert operators(apply(model, "fold")[0]) == ["Conv", "Mul"]
    assert "float16" in reasons(model)[0]


def test_a_sum_of_offsets_outside_the_range_of_float16_is_not_made() -> None:
    nodes = [node("Add", "x k", "m"), node("Add", "m k")]
    model = net(nodes, {"x": [3]}, {"k": np.float16(6e4)}, dtype=TensorProto.FLOAT16)
    result, _ = apply(model, "fold")
    assert operators(result) == ["Add", "Add"]
    assert_same(model, result, {"x": np.full(3, -6e4, np.float16)})


def test_float16_stays_float16() -> None:
    model = half(0.3, 1)
    result, _ = apply(model, "fold")
    assert operators(result) == ["Conv"]
    folded = next(iter(weights(result).values()))
    exact = weights(model)["w"].astype(np.float64) * np.float64(np.float16(0.3))
    np.testing.assert_array_equal(folded, exact.astype(np.float16))
    assert_same(model, result, {"x": normal(1, 4, 5).astype(np.float16)}, rtol=5e-3)


@pytest.mark.parametrize(("scale", "weight"), [(3e-5, 0.01), (3e4, 10.0)])
def test_weights_outside_the_normal_range_of_float16_are_not_made(scale: float, weight: float) -> None:
    assert operators(apply(half(scale, weight), "fold")[0]) == ["Conv", "Mul"]
    assert "float16" in reasons(half(scale, weight))[0]


def test_channels_that_training_switched_off_do_not_hinder_the_others() -> None:
    parts = batchnorm(3)
    parts["scale"][1] = 1e-41
    nodes = [node("Conv", "x w", "c"), node("BatchNormalization", f"c {BN}")]
    model = net(nodes, {"x": [1, 4, 5]}, {"w": normal(3, 4, 1), **parts})
    assert operators(fold(model, {"x": normal(1, 4, 5)})) == ["Conv"]


def test_bfloat16_is_rounded_once() -> None:
    import ml_dtypes

    w, k = normal(3, 4, 1).astype(ml_dtypes.bfloat16), normal(3, 1).astype(ml_dtypes.bfloat16)
    model = net(
        [node("Conv", "x w", "c"), node("Mul", "c k")], {"x": [1, 4, 5]}, {"w": w, "k": k}, dtype=TensorProto.BFLOAT16,
        opset=22,
    )  # fmt: skip
    result, _ = apply(model, "fold")
    assert operators(result) == ["Conv"]
    exact = w.astype(np.float64) * k.astype(np.float64)[:, :, None]
    folded = numpy_helper.to_array(result.graph.initializer[0])
    np.testing.assert_array_equal(folded.astype(np.float32), exact.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_folds_in_a_row_round_once() -> None:
    k, a, s, w = normal(3, 1), normal(3, 1), normal(4, 1), normal(3, 4, 1)
    nodes = [node("Mul", "x s", "m"), node("Conv", "m w", "c"), node("Mul", "c k", "d"), node("Div", "d a")]
    model = net(nodes, {"x": [1, 4, 5]}, {"w": w, "k": k, "a": a, "s": s})
    result = fold(model, {"x": normal(1, 4, 5)})
    w64, k64, a64, s64 = (v.astype(np.float64) for v in (w, k, a, s))
    exact = w64 * (1 / a64 * k64)[:, :, None] * s64[None, :]
    folded = next(v for v in weights(result).values() if v.shape == w.shape)
    np.testing.assert_array_equal(folded, exact.astype(np.float32))


@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_small_rows_are_found_whatever_the_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit, "_BLOCK", block)
    matrix = normal(2, 5, 3, 2).astype(np.float64)
    assert edit.representable(matrix, ir.DataType.FLOAT)
    assert not edit.representable(1e-42 * matrix, ir.DataType.FLOAT)
    matrix[1, 4] *= 1e-42  # drowns in the others
    assert edit.representable(matrix, ir.DataType.FLOAT)
    matrix[0, 3, 2, 1] = 1e300
    assert not edit.representable(matrix, ir.DataType.FLOAT)


def test_the_content_of_a_constant_is_read_again_when_it_is_another() -> None:
    graph = ir.Graph([], [], nodes=[])
    constants, value = edit.Weights(), add_constant(graph, "v", np.zeros(4))
    for content in normal(3, 4):
        set_constant(value, content)
        np.testing.assert_array_equal(constants.read(value), content)


def test_a_constant_of_another_type_or_shape_does_not_serve() -> None:
    value = ir.Value(name="v")
    set_constant(value, np.array([1, 2]))
    assert edit._equal(value, np.array([1, 2]))
    assert not edit._equal(value, np.array([1, 2], np.float32))
    assert not edit._equal(value, np.array([[1, 2]]))
