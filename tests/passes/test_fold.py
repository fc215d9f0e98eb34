"""fold: every rule folds what it may, and nothing when its condition does not hold."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))
from oracles import CONTEXT, apply, assert_same, operators, run
from strategies import Builder, Case, Value, conv, conv_transpose, gemm, matmul

from onnxslim import model as model_io
from onnxslim import runtime, verify
from onnxslim.data import input_specs, open_data
from onnxslim.pipeline import parse

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def net(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[Any]],
    weights: dict[str, np.ndarray],
    outputs: dict[str, Sequence[Any] | None] | Sequence[str] = ("y",),
    *,
    opset: int = 17,
    dtype: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """A model from its parts; an output without a shape leaves it to inference."""
    shapes = outputs if isinstance(outputs, dict) else dict.fromkeys(outputs)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(n, dtype, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, dtype, s) for n, s in shapes.items()],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(op: str, inputs: str, output: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), name=f"node_{output.split()[0]}", **attributes)


def fold(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """``model`` folded, after checking that it still computes the same."""
    result, _ = apply(model, "fold")
    assert_same(model, result, feeds)
    return result


def reasons(model: onnx.ModelProto) -> list[str]:
    return [skip.reason for skip in apply(model, "fold")[1][0].skipped]


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


# -- affine maps behind a linear operator ---------------------------------------------------------------------------


def channel_axis(op: str, rank: int) -> int:
    return rank - 1 if op in ("Gemm", "MatMul") else 1


def per_channel(b: Builder, x: Value, axis: int) -> Value:
    """An affine node whose constants vary along ``axis`` alone."""
    op = b.pick("Mul", "Add", "Sub", "Div", "Neg", "BatchNormalization")
    if op == "Neg":
        return b.node(op, [x.name], x.shape)
    if op == "BatchNormalization" and axis == 1:
        c = (x.shape[1],)
        return b.node(
            op, [x.name, b.weight(c), b.weight(c), b.weight(c), b.weight(c, positive=True)], x.shape, epsilon=0.01
        )
    op = "Add" if op == "BatchNormalization" else op
    shape = [1] * x.rank
    shape[axis] = x.shape[axis]
    c = b.weight(b.pick(shape[axis:], shape, (), (1,)), positive=op == "Div")
    return b.node(op, [c, x.name] if op != "Div" and b.pick(False, True) else [x.name, c], x.shape)


def linear(b: Builder, x: Value) -> Value:
    for _ in range(20):
        template = b.pick(conv, conv_transpose) if x.rank > 3 else b.pick(matmul, conv) if x.rank == 3 else gemm
        result = template(b, x)
        if result is not None:
            return result
    assume(False)
    raise AssertionError


def made_larger(model: onnx.ModelProto) -> bool:
    """Whether a bias that was not there would weigh more than the nodes that would go."""
    operator = next(n for n in model.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm"))
    return len(operator.input) == 2 and any("larger" in reason for reason in reasons(model))


SHAPES = st.sampled_from([(4, 5, 6), (3, 7), (5,), (4, 4, 4), (3, 3)])


@FEW
@given(st.data())
def test_affine_maps_behind_a_linear_operator_disappear(data: st.DataObject) -> None:
    b = Builder(data.draw, share=False, symbolic=data.draw(st.booleans()))
    x = linear(b, b.input(data.draw(SHAPES)))
    operator = b.nodes[-1]
    # MatMul with the weight on the left has its channels on the axis before the last.
    left = operator.op_type == "MatMul" and operator.input[0] in b.weights
    axis = x.rank - 2 if left else channel_axis(operator.op_type, x.rank)
    assume(axis > 0)
    for _ in range(data.draw(st.integers(1, 3))):
        x = per_channel(b, x, axis)
    bias_varies = (
        operator.op_type == "Gemm" and len(operator.input) > 2 and b.weights[operator.input[2]].shape[:1] > (1,)
    )
    assume(not bias_varies or b.weights[operator.input[2]].shape[0] != 2)
    model, feeds = b.finish([x])
    left_over = operators(fold(model, feeds))
    if operator.op_type == "MatMul":  # no room for the offset
        assert left_over in (["MatMul"], ["MatMul", "Add"]) or (len(b.nodes) == 2 and len(left_over) == 2)
    else:
        assert left_over == [operator.op_type] or made_larger(model)


@pytest.mark.parametrize("constant", [(4,), (4, 1), (1, 4, 1), (2, 1, 1, 1), (2, 4, 1, 1), (1, 4, 4, 4), (1, 4, 1, 4)])
@pytest.mark.parametrize("op", ["Mul", "Add", "Sub"])
def test_constants_along_another_axis_stay(op: str, constant: tuple[int, ...]) -> None:
    # All sizes are 4: only the position tells the channel axis from the others.
    model = net(
        [node("Conv", "x w b", "c"), node(op, "c k")],
        {"x": [2, 4, 4, 4]},
        {"w": normal(4, 4, 1, 1), "b": normal(4), "k": normal(*constant)},
    )
    result = fold(model, {"x": normal(2, 4, 4, 4)})
    along_channels = constant == (1, 4, 1) or constant == (4, 1, 1)
    assert operators(result) == (
        ["Conv"] if along_channels and len(constant) == 3 and constant[0] == 4 else ["Conv", op]
    )


@pytest.mark.parametrize("constant", [(4, 1), (1, 4, 1), (4, 1, 1), (4, 4)])
def test_constants_along_another_axis_of_matmul_stay(constant: tuple[int, ...]) -> None:
    model = net(
        [node("MatMul", "x w", "m"), node("Mul", "m k")], {"x": [4, 4, 4]}, {"w": normal(4, 4), "k": normal(*constant)}
    )
    assert operators(fold(model, {"x": normal(4, 4, 4)})) == ["MatMul", "Mul"]


def test_constants_that_add_an_axis_stay() -> None:
    model = net(
        [node("Conv", "x w", "c"), node("Mul", "c k")],
        {"x": [1, 4, 4]},
        {"w": normal(4, 4, 1), "k": normal(1, 1, 4, 1)},
        {"y": [1, 1, 4, 4]},
    )
    assert operators(fold(model, {"x": normal(1, 4, 4)})) == ["Conv", "Mul"]


def test_constants_that_add_an_axis_to_a_matmul_of_unknown_rank_stay() -> None:
    model = net(
        [node("MatMul", "x w", "m"), node("Mul", "m k")],
        {"x": None},
        {"w": normal(4, 3), "k": normal(1, 3)},  # type: ignore[dict-item]
    )
    assert operators(fold(model, {"x": normal(4)})) == ["MatMul", "Mul"]


def test_constants_that_broadcast_the_result_stay() -> None:
    model = net(
        [node("Conv", "x w", "c"), node("Mul", "c k")],
        {"x": [1, 2, 4]},
        {"w": normal(1, 2, 1), "k": normal(3, 1)},
        {"y": [1, 3, 4]},
    )
    assert operators(fold(model, {"x": normal(1, 2, 4)})) == ["Conv", "Mul"]


def test_batchnorm_behind_a_product_of_rank_3_is_not_per_output_channel() -> None:
    bn = {k: normal(4) for k in "sbm"} | {"v": np.abs(normal(4)) + 0.5}
    nodes = [node("MatMul", "x w", "m"), node("BatchNormalization", "m s b m_ v")]
    model = net(nodes, {"x": [2, 4, 4]}, {"w": normal(4, 4), "s": bn["s"], "b": bn["b"], "m_": bn["m"], "v": bn["v"]})
    assert operators(fold(model, {"x": normal(2, 4, 4)})) == ["MatMul", "BatchNormalization"]


def test_a_result_that_others_read_stays() -> None:
    parts = {"w": normal(3, 4, 1, 1), "k": normal(3, 1, 1)}
    two_readers = [node("Conv", "x w", "c"), node("Mul", "c k", "y"), node("Relu", "c", "z")]
    an_output = two_readers[:2]
    feeds = {"x": normal(1, 4, 2, 2)}
    assert "Mul" in operators(fold(net(two_readers, {"x": [1, 4, 2, 2]}, parts, ("y", "z")), feeds))
    assert "Mul" in operators(fold(net(an_output, {"x": [1, 4, 2, 2]}, parts, ("y", "c")), feeds))
    twice = [node("Conv", "x w", "c"), node("Mul", "c c")]
    assert operators(fold(net(twice, {"x": [1, 4, 2, 2]}, {"w": parts["w"]}), feeds)) == ["Conv", "Mul"]


def batchnorm(channels: int, prefix: str = "") -> dict[str, np.ndarray]:
    arrays = {f"{prefix}{name}": normal(channels) for name in ("scale", "shift", "mean")}
    return {**arrays, f"{prefix}var": np.abs(normal(channels)) + np.float32(0.5)}


BN = "scale shift mean var"


def test_batchnorm_in_training_mode_stays() -> None:
    nodes = [
        node("Conv", "x w", "c"),
        helper.make_node("BatchNormalization", ["c", *BN.split()], ["y", "m", "v"], training_mode=1),
    ]
    model = net(nodes, {"x": [2, 4, 3]}, {"w": normal(3, 4, 1), **batchnorm(3)})
    before = weights(model)
    result, outcomes = apply(model, "fold")
    assert operators(result) == ["Conv", "BatchNormalization"]
    assert all(np.array_equal(before[k], a) for k, a in weights(result).items())
    assert "training mode" in outcomes[0].skipped[0].reason


def test_batchnorm_of_computed_scale_stays() -> None:
    nodes = [
        node("Abs", "s", "scale"),
        node("Conv", "x w", "c"),
        node("BatchNormalization", f"c {BN}"),
    ]
    parts = batchnorm(3)
    parts.pop("scale")
    model = net(nodes, {"x": [2, 4, 3], "s": [3]}, {"w": normal(3, 4, 1), **parts})
    assert operators(fold(model, {"x": normal(2, 4, 3), "s": normal(3)})) == ["Abs", "Conv", "BatchNormalization"]
    assert "computed at run time" in reasons(model)[0]


def test_computed_weights_stay() -> None:
    nodes = [node("Abs", "v", "w"), node("Conv", "x w", "c"), node("BatchNormalization", f"c {BN}")]
    model = net(nodes, {"x": [2, 4, 3], "v": [3, 4, 1]}, batchnorm(3))
    result = fold(model, {"x": normal(2, 4, 3), "v": normal(3, 4, 1)})
    assert operators(result) == ["Abs", "Conv", "BatchNormalization"]


def test_a_bias_computed_at_run_time_stays() -> None:
    nodes = [node("Conv", "x w b", "c"), node("Mul", "c k")]
    model = net(nodes, {"x": [2, 4, 3], "b": [3]}, {"w": normal(3, 4, 1), "k": np.float32(2)})
    assert operators(fold(model, {"x": normal(2, 4, 3), "b": normal(3)})) == ["Conv", "Mul"]


def test_a_gemm_bias_that_varies_along_the_batch_stays() -> None:
    nodes = [node("Gemm", "x w b", "c"), node("Mul", "c k")]
    model = net(nodes, {"x": [3, 4]}, {"w": normal(4, 3), "k": normal(3), "b": normal(3, 1)})
    assert operators(fold(model, {"x": normal(3, 4)})) == ["Gemm", "Mul"]


def test_gemm_with_the_weight_on_the_left_has_its_channels_on_the_rows() -> None:
    nodes = [node("Gemm", "w x b", "c", alpha=0.5, beta=2.0, transA=1), node("Mul", "c k", "d"), node("Add", "k d")]
    parts = {"w": normal(4, 3), "b": normal(3, 1), "k": normal(3, 1)}
    assert operators(fold(net(nodes, {"x": [4, 3]}, parts), {"x": normal(4, 3)})) == ["Gemm"]
    wrong = {**parts, "k": normal(3)}
    assert "Mul" in operators(fold(net(nodes, {"x": [4, 3]}, wrong), {"x": normal(4, 3)}))


def test_layer_normalization_takes_the_scale_and_offset_behind_it() -> None:
    nodes = [node("LayerNormalization", "x g b", "n"), node("Mul", "n k", "m"), node("Add", "m a")]
    parts = {name: normal(6) for name in "gbka"}
    assert operators(fold(net(nodes, {"x": [2, 3, 6]}, parts), {"x": normal(2, 3, 6)})) == ["LayerNormalization"]
    before = [node("Mul", "x k", "m"), node("LayerNormalization", "m g b")]
    parts.pop("a")
    assert operators(fold(net(before, {"x": [2, 3, 6]}, parts), {"x": normal(2, 3, 6)})) == [
        "Mul",
        "LayerNormalization",
    ]


def test_matmul_and_add_become_gemm_only_where_they_are_matrices() -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b")]
    parts = {"w": normal(4, 3), "b": normal(3)}
    assert operators(fold(net(nodes, {"x": ["n", 4]}, parts), {"x": normal(5, 4)})) == ["Gemm"]
    assert operators(fold(net(nodes, {"x": ["n", 2, 4]}, parts), {"x": normal(5, 2, 4)})) == ["MatMul", "Add"]
    assert operators(fold(net(nodes, {"x": None}, parts), {"x": normal(5, 2, 4)})) == ["MatMul", "Add"]  # type: ignore[dict-item]
    rows = {**parts, "b": normal(3, 1)}
    assert operators(fold(net(nodes, {"x": [3, 4]}, rows), {"x": normal(3, 4)})) == ["MatMul", "Add"]


# -- affine maps in front of a linear operator ----------------------------------------------------------------------


@FEW
@given(st.data())
def test_affine_maps_in_front_of_an_unpadded_operator_disappear(data: st.DataObject) -> None:
    b = Builder(data.draw, share=False)
    shape = data.draw(SHAPES)
    x = b.input(shape)
    op = {3: "Conv", 2: "Conv", 1: "Gemm"}[len(shape)]
    for _ in range(data.draw(st.integers(1, 3))):
        x = per_channel(b, x, 1)
    if op == "Gemm":
        transposed = data.draw(st.integers(0, 1))
        w = b.weight((2, shape[0]) if transposed else (shape[0], 2))
        y = b.node("Gemm", [x.name, w], (2, 2), transB=transposed, alpha=0.5)
    else:
        group = data.draw(st.sampled_from([1, shape[0]]))
        sizes = [n - 2 for n in shape[1:]]
        w = b.weight((2 * shape[0], shape[0] // group, *(2,) * len(sizes)))
        y = b.node("Conv", [x.name, w], (2, 2 * shape[0], *sizes), group=group, dilations=[2] * len(sizes))
    model, feeds = b.finish([y])
    assert operators(fold(model, feeds)) == [op] or made_larger(model)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1, 1]},
        {"pads": [0, 1]},
        {"auto_pad": "SAME_UPPER"},
        {"strides": [2]},
        {"strides": [2], "output_padding": [1]},
        {},
    ],
)
def test_an_offset_that_zero_padding_does_not_see_stays(op: str, attributes: dict[str, Any]) -> None:
    if op == "Conv" and "output_padding" in attributes:
        return
    model = net(
        [node("Add", "x k", "a"), node(op, "a w b", **attributes)],
        {"x": [1, 3, 8]},
        {"k": normal(3, 1), "w": normal(3, 3, 3), "b": normal(3)},
    )
    exact = op == "Conv" and not {"pads", "auto_pad"} & set(attributes)
    assert operators(fold(model, {"x": normal(1, 3, 8)})) == ([op] if exact else ["Add", op])


def test_a_scale_in_front_of_a_padded_operator_leaves_the_offset() -> None:
    nodes = [node("Mul", "x k", "m"), node("Add", "m a", "n"), node("Conv", "n w", pads=[1, 1], group=3)]
    parts = {"k": normal(3, 1), "a": normal(1), "w": normal(6, 1, 3)}
    assert operators(fold(net(nodes, {"x": [1, 3, 8]}, parts), {"x": normal(1, 3, 8)})) == ["Add", "Conv"]
    parts["k"][1] = 0  # its offset cannot be reached by a scaled one
    assert operators(fold(net(nodes, {"x": [1, 3, 8]}, parts), {"x": normal(1, 3, 8)})) == ["Mul", "Add", "Conv"]


def test_constants_that_broadcast_the_data_stay_in_front() -> None:
    model = net(
        [node("Mul", "x k", "m"), node("Conv", "m w")], {"x": [1, 1, 4]}, {"k": normal(3, 1), "w": normal(2, 3, 1)}
    )
    assert operators(fold(model, {"x": normal(1, 1, 4)})) == ["Mul", "Conv"]
    vector = net([node("Mul", "x k", "m"), node("MatMul", "m w")], {"x": [4]}, {"k": normal(3, 4), "w": normal(4, 2)})
    assert operators(fold(vector, {"x": normal(4)})) == ["Mul", "MatMul"]


def test_a_constant_along_another_axis_stays_in_front() -> None:
    for constant in ((4,), (1, 1, 4), (4, 1, 1), (4, 4)):
        model = net(
            [node("Mul", "x k", "m"), node("Conv", "m w")],
            {"x": [4, 4, 4]},
            {"k": normal(*constant), "w": normal(4, 4, 1)},
        )
        assert operators(fold(model, {"x": normal(4, 4, 4)})) == ["Mul", "Conv"]


def test_every_reader_must_take_the_affine_map() -> None:
    parts = {"k": normal(4), "a": normal(4), "v": normal(4, 3), "w": normal(4, 3)}
    both = [node("Mul", "x k", "m"), node("MatMul", "m v", "y"), node("MatMul", "m w", "z")]
    feeds = {"x": normal(2, 3, 4)}
    parts.pop("a")
    assert operators(fold(net(both, {"x": [2, 3, 4]}, parts, ("y", "z")), feeds)) == ["MatMul", "MatMul"]
    one = [node("Mul", "x k", "m"), node("MatMul", "m v", "y"), node("Relu", "m", "z")]
    parts.pop("w")
    assert "Mul" in operators(fold(net(one, {"x": [2, 3, 4]}, parts, ("y", "z")), feeds))
    assert "Mul" in operators(fold(net(one[:2], {"x": [2, 3, 4]}, parts, ("y", "m")), feeds))


def test_an_offset_moves_through_a_product_only_into_an_add_that_is_there() -> None:
    parts = {"a": normal(4), "w": normal(4, 3), "b": normal(3)}
    nodes = [node("Add", "x a", "m"), node("MatMul", "m w", "p"), node("Add", "p b")]
    feeds = {"x": normal(2, 5, 4)}
    assert operators(fold(net(nodes, {"x": [2, 5, 4]}, parts), feeds)) == ["MatMul", "Add"]
    alone = [nodes[0], node("MatMul", "m w")]
    parts.pop("b")
    assert operators(fold(net(alone, {"x": [2, 5, 4]}, parts), feeds)) == ["Add", "MatMul"]
    stack = {**parts, "w": normal(2, 4, 3), "b": normal(3)}
    assert operators(fold(net(nodes, {"x": [2, 5, 4]}, stack), feeds)) == ["Add", "MatMul", "Add"]


def test_an_offset_far_larger_than_what_is_left_stays() -> None:
    # Data near 20,000 minus 20,000: the sum of products must not be formed before the difference.
    nodes = [node("Sub", "x k", "m"), node("Conv", "m w")]
    model = net(nodes, {"x": [1, 3, 5]}, {"k": np.full((3, 1), 20000, np.float32), "w": normal(2, 3, 1)})
    assert operators(fold(model, {"x": 20000 + normal(1, 3, 5)})) == ["Sub", "Conv"]


# -- weights that others use ----------------------------------------------------------------------------------------


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


# -- number formats -------------------------------------------------------------------------------------------------


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


# -- runs of elementwise nodes --------------------------------------------------------------------------------------


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
    assert operators(fold(chain("Relu;Mul a;Mul b;Relu", parts, (1, 4)), {"x": normal(1, 4)})) == ["Relu", "Relu"]


def test_adding_and_subtracting_a_large_number_rounds_on_purpose() -> None:
    model = chain("Abs;Add a;Sub a;Abs", {"a": np.float32(1.5 * 2**23)})
    assert operators(fold(model, {"x": normal(2, 3) * 10})) == ["Abs", "Add", "Sub", "Abs"]
    model = chain("Abs;Add a;Sub a;Abs", {"a": np.float32(15)})
    assert operators(fold(model, {"x": normal(2, 3) * 10})) == ["Abs", "Abs"]


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


# -- what ONNX Runtime fuses ----------------------------------------------------------------------------------------


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


# -- padding --------------------------------------------------------------------------------------------------------


def padded(
    op: str,
    amounts: Sequence[int],
    fill: float | None = None,
    *,
    relu: bool = False,
    mode: str = "constant",
    **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    parts: dict[str, np.ndarray] = {"pads": np.array(amounts, np.int64)}
    nodes = [node("Relu", "x", "r")] if relu else []
    if fill is not None:
        parts["fill"] = np.float32(fill)
    nodes.append(node("Pad", f"{'r' if relu else 'x'} pads{' fill' if fill is not None else ''}", "p", mode=mode))
    if op == "Conv":
        parts["w"] = normal(2, 3, 3, 3)
    else:
        attributes.setdefault("kernel_shape", [3, 3])
    nodes.append(node(op, "p w" if op == "Conv" else "p", **attributes))
    return net(nodes, {"x": [1, 3, 6, 5]}, parts), {"x": normal(1, 3, 6, 5) - 1}


SPATIAL = (0, 0, 1, 2, 0, 0, 2, 0)


@pytest.mark.parametrize(
    ("arguments", "attributes", "folds"),
    [
        (("Conv", SPATIAL), {}, True),
        (("Conv", SPATIAL, 0.0), {"pads": [1, 0, 0, 2], "strides": [2, 1], "dilations": [1, 2]}, True),
        (("Conv", SPATIAL), {"auto_pad": "VALID"}, True),
        (("Conv", SPATIAL), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, False),
        (("Conv", SPATIAL, 1.0), {}, False),
        (("Conv", (0, 0, 1, -1, 0, 0, 0, 1)), {}, False),
        (("Conv", (1, 0, 1, 1, 0, 0, 0, 1)), {}, False),
        (("AveragePool", SPATIAL), {}, True),
        (("AveragePool", SPATIAL), {"pads": [1, 0, 0, 0], "count_include_pad": 1}, False),
        (("AveragePool", (0, 0, 1, 1, 0, 0, 0, 1)), {"pads": [1, 0, 0, 0], "count_include_pad": 1}, True),
        (("AveragePool", (0, 0, 1, 1, 0, 0, 0, 1)), {"pads": [1, 0, 0, 0]}, False),
        (("AveragePool", SPATIAL, 2.0), {}, False),
        (("AveragePool", (0, 0, 1, 1, 0, 0, 1, 1)), {"ceil_mode": 1, "strides": [2, 2]}, False),
        (("MaxPool", SPATIAL, -np.inf), {}, True),
        (("MaxPool", SPATIAL, float(np.finfo(np.float32).min)), {}, True),
        (("MaxPool", SPATIAL), {}, False),
        (("MaxPool", (0, 0, 3, 0, 0, 0, 0, 0), -np.inf), {}, False),
        (("MaxPool", (0, 0, 1, 1, 0, 0, 1, 1), -np.inf), {"ceil_mode": 1, "strides": [2, 2]}, False),
    ],
)
def test_pads(arguments: tuple[Any, ...], attributes: dict[str, Any], folds: bool) -> None:
    if arguments == ("AveragePool", SPATIAL) and attributes.get("pads"):
        attributes = {**attributes, "pads": [2, 0, 0, 0]}  # 1 + 2 rows of padding are as many as the window has
    model, feeds = padded(*arguments, **attributes)
    result = fold(model, feeds)
    assert ("Pad" not in operators(result)) == folds
    assert bool(reasons(model)) != folds


def test_zeros_never_win_against_the_result_of_a_relu() -> None:
    model, feeds = padded("MaxPool", SPATIAL, relu=True)
    assert operators(fold(model, feeds)) == ["Relu", "MaxPool"]
    model, feeds = padded("MaxPool", SPATIAL, 0.5, relu=True)
    assert operators(fold(model, feeds)) == ["Relu", "Pad", "MaxPool"]


def test_indices_of_a_maximum_count_padded_elements() -> None:
    model, feeds = padded("MaxPool", SPATIAL, -np.inf)
    model.graph.node[-1].output.append("indices")
    model.graph.output.append(helper.make_tensor_value_info("indices", TensorProto.INT64, None))
    assert operators(fold(model, feeds)) == ["Pad", "MaxPool"]


def test_other_modes_of_pad_stay() -> None:
    for mode in ("edge", "reflect"):
        model, feeds = padded("Conv", SPATIAL, mode=mode)
        assert operators(fold(model, feeds)) == ["Pad", "Conv"]


def test_a_padded_value_that_others_read_stays() -> None:
    model, feeds = padded("Conv", SPATIAL)
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, None))
    assert operators(fold(model, feeds)) == ["Pad", "Conv"]


def test_pads_by_axes_and_pads_of_old_operator_sets() -> None:
    parts = {"pads": np.array([1, 2], np.int64), "axes": np.array([-1], np.int64), "w": normal(2, 3, 2)}
    new = net(
        [node("Pad", "x pads  axes".replace("  ", " none "), "p"), node("Conv", "p w")],
        {"x": [1, 3, 5]},
        parts,
        opset=18,
    )
    new.graph.node[0].input[2] = ""
    result = fold(new, {"x": normal(1, 3, 5)})
    assert operators(result) == ["Conv"]
    old = net(
        [node("Pad", "x", "p", pads=[0, 0, 1, 0, 0, 2], value=0.0), node("Conv", "p w")],
        {"x": [1, 3, 5]},
        {"w": normal(2, 3, 2)},
        opset=10,
    )
    assert operators(fold(old, {"x": normal(1, 3, 5)})) == ["Conv"]


# -- the whole pass -------------------------------------------------------------------------------------------------


def test_the_demo_model_loses_all_its_batch_normalizations() -> None:
    root = Path(__file__).parents[2]
    model = onnx.load(root / "models" / "fmnist_cnn.onnx")
    images = np.load(root / "models" / "fmnist_calib.npz")[model.graph.input[0].name][:8]
    simplified, _ = apply(model, "simplify")
    result, outcomes = apply(simplified, "fold")
    assert operators(simplified).count("BatchNormalization") == 9
    assert "BatchNormalization" not in operators(result)
    assert outcomes[0].stats == {"after Conv": 9}
    assert outcomes[0].skipped == []
    for k in range(len(images)):
        assert_same(model, result, {model.graph.input[0].name: images[k : k + 1]})


def test_operator_sets_without_numpy_broadcasting_are_left_alone() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k", broadcast=1, axis=1)]
    model = net(nodes, {"x": [1, 4, 4]}, {"w": normal(4, 4, 1), "k": normal(4)}, opset=6)
    loaded, _ = apply(model, "")
    result, _ = apply(model, "fold")
    if loaded.opset_import[0].version < 7:
        assert operators(result) == ["Conv", "Mul"]


def test_names_and_declared_shapes_of_outputs_stay() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k", "m"), node("Add", "m k")]
    model = net(
        nodes, {"x": ["batch", 4, "time"]}, {"w": normal(3, 4, 1), "k": normal(3, 1)}, {"y": ["batch", 3, "time"]}
    )
    result = fold(model, {"x": normal(2, 4, 6)})
    assert [o.name for o in result.graph.output] == ["y"]
    assert [d.dim_param or d.dim_value for d in result.graph.output[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        "time",
    ]
    assert run(result, {"x": normal(3, 4, 2)})["y"].shape == (3, 3, 2)


def test_long_networks_are_folded_whole() -> None:
    depth = 300
    nodes, parts, at = [], {}, "x"
    for k in range(depth):
        nodes += [node("Conv", f"{at} w{k}", f"c{k}"), node("BatchNormalization", f"c{k} {BN}", f"n{k}")]
        nodes.append(node("Relu", f"n{k}", f"r{k}"))
        parts[f"w{k}"] = normal(2, 2, 1)
        at = f"r{k}"
    model = net(nodes, {"x": [1, 2, 3]}, {**parts, **batchnorm(2)}, (at,))
    result, outcomes = apply(model, "fold")
    assert outcomes[0].stats["after Conv"] == depth
    assert operators(result) == ["Conv", "Relu"] * depth


# -- linear operators in a row --------------------------------------------------------------------------------------


def test_products_of_matrices_are_merged_when_that_has_no_more_weights() -> None:
    nodes = [node("MatMul", "x v", "p"), node("Add", "p a", "q"), node("MatMul", "q w", "r"), node("Add", "r b")]
    feeds = {"x": normal(2, 5, 6)}

    def through(width: int) -> list[str]:
        parts = {"v": normal(6, width), "a": normal(width), "w": normal(width, 6), "b": normal(6)}
        return operators(fold(net(nodes, {"x": [2, 5, 6]}, parts), feeds))

    assert through(8) == ["MatMul", "Add"]
    assert through(3) == ["MatMul", "Add"]
    assert through(2) == ["MatMul", "MatMul", "Add"]


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


# -- branches that are added ----------------------------------------------------------------------------------------


def test_a_repvgg_block_becomes_one_convolution() -> None:
    nodes = [
        node("Conv", "x v", "c3", pads=[1, 1, 1, 1], group=2), node("BatchNormalization", f"c3 {BN}", "n3"),
        node("Conv", "x w", "c1", group=2), node("BatchNormalization", "c1 1scale 1shift 1mean 1var", "n1"),
        node("BatchNormalization", "x 0scale 0shift 0mean 0var", "n0"),
        node("Add", "n3 n1", "s"), node("Add", "s n0", "t"), node("Relu", "t"),
    ]  # fmt: skip
    parts = {"v": normal(6, 3, 3, 3), "w": normal(6, 3, 1, 1), **batchnorm(6), **batchnorm(6, "1"), **batchnorm(6, "0")}
    model = net(nodes, {"x": ["n", 6, "h", 7]}, parts)
    assert operators(fold(model, {"x": normal(2, 6, 5, 7)})) == ["Conv", "Relu"]


@FEW
@given(st.data())
def test_convolutions_that_are_added_merge_when_one_reads_all_the_other_reads(data: st.DataObject) -> None:
    pick = lambda *options: data.draw(st.sampled_from(options))  # noqa: E731
    branches, parts = [], {}
    loss, stride = pick(0, 2), pick(1, 2)
    for k in range(2):
        taps, group, dilation = pick(3, 1, 5, 2), pick(1, 4), pick(1, 1, 2)
        padding = max(dilation * (taps - 1) - loss, 0) if pick(True, True, False) else pick(0, 1, 2, 3)
        before = data.draw(st.integers(0, padding))
        strides = [stride if pick(True, True, False) else 1]
        branches.append(
            {"strides": strides, "dilations": [dilation], "pads": [before, padding - before], "group": group}
        )
        parts[f"w{k}"], parts[f"b{k}"] = normal(4, 4 // group, taps), normal(4)
    nodes = [node("Conv", f"x w{k} b{k}", f"c{k}", **branches[k]) for k in range(2)]
    nodes.append(node(pick("Add", "Sub"), "c0 c1"))
    model = net(nodes, {"x": [2, 4, 12]}, parts)
    try:
        expected = run(model, {"x": normal(2, 4, 12)})
    except Exception:  # results of different sizes
        assume(False)
    result = fold(model, {"x": normal(2, 4, 12)})
    assert expected["y"].shape == run(result, {"x": normal(2, 4, 12)})["y"].shape
    reads = [
        {t * b["dilations"][0] - b["pads"][0] for t in range(parts[f"w{k}"].shape[2])} for k, b in enumerate(branches)
    ]
    sizes = [sum(b["pads"]) - b["dilations"][0] * (parts[f"w{k}"].shape[2] - 1) for k, b in enumerate(branches)]
    same = sizes[0] == sizes[1] and branches[0]["strides"] == branches[1]["strides"]
    fits = any(
        reads[other] <= reads[host] and branches[other]["group"] % branches[host]["group"] == 0
        for host, other in ((0, 1), (1, 0))
    )
    assert len(result.graph.node) == (1 if same and fits else 3)


def test_the_data_itself_is_added_only_where_sizes_agree() -> None:
    def merged(pads: list[int], strides: list[int], channels: int) -> bool:
        nodes = [node("Conv", "x w b", "c", pads=pads, strides=strides), node("Add", "x c")]
        model = net(nodes, {"x": [1, channels, 1]}, {"w": normal(4, channels, 3), "b": normal(4)}, {"y": None})
        return operators(fold(model, {"x": normal(1, channels, 1)})) == ["Conv"]

    assert merged([1, 1], [1], 4)
    assert not merged([2, 1], [1], 4)  # results of two and one positions: the data is broadcast
    assert not merged([1, 1], [2], 4)
    assert not merged([1, 1], [1], 1)


def test_a_low_rank_update_merges_into_its_matrix() -> None:
    nodes = [
        node("MatMul", "x w", "p"), node("MatMul", "x a", "q"), node("MatMul", "q b", "r"),
        node("Mul", "r half", "s"), node("Add", "p s"),
    ]  # fmt: skip
    parts = {"w": normal(8, 8), "a": normal(8, 2), "b": normal(2, 8), "half": np.float32(0.5)}
    assert operators(fold(net(nodes, {"x": [2, 3, 8]}, parts), {"x": normal(2, 3, 8)})) == ["MatMul"]


def test_the_factors_of_gemm_branches_are_kept() -> None:
    nodes = [node("Gemm", "x w b", "p", alpha=0.5, beta=2.0), node("Gemm", "x v", "q", alpha=3.0), node("Sub", "q p")]
    model = net(nodes, {"x": [2, 4]}, {"w": normal(4, 5), "v": normal(4, 5), "b": normal(5)})
    assert operators(fold(model, {"x": normal(2, 4)})) == ["Gemm"]


def test_branches_of_transposed_data_merge_with_their_like_only() -> None:
    nodes = [node("Gemm", "x w b", "p", transA=1), node("Gemm", "x v", "q", transA=1), node("Add", "q p")]
    parts = {"w": normal(4, 4), "v": normal(4, 4), "b": normal(4)}
    assert operators(fold(net(nodes, {"x": [4, 4]}, parts), {"x": normal(4, 4)})) == ["Gemm"]
    nodes[1] = node("Gemm", "x v", "q")
    assert len(operators(fold(net(nodes, {"x": [4, 4]}, parts), {"x": normal(4, 4)}))) == 3
    nodes[1:] = [node("Add", "x p")]
    parts.pop("v")
    assert operators(fold(net(nodes, {"x": [4, 4]}, parts), {"x": normal(4, 4)})) == ["Gemm", "Add"]


def test_paddings_that_depend_on_the_size_of_the_data_are_not_compared() -> None:
    nodes = [node("Conv", "x w", "p", auto_pad="SAME_UPPER"), node("Conv", "x v", "q", auto_pad="SAME_LOWER")]
    model = net([*nodes, node("Add", "p q")], {"x": [1, 3, 6]}, {"w": normal(3, 3, 2), "v": normal(3, 3, 2)})
    assert len(operators(fold(model, {"x": normal(1, 3, 6)}))) == 3


def test_branches_of_different_values_stay() -> None:
    nodes = [node("MatMul", "x w", "p"), node("MatMul", "z v", "q"), node("Add", "p q")]
    model = net(nodes, {"x": [2, 3, 4], "z": [2, 3, 4]}, {"w": normal(4, 5), "v": normal(4, 5)})
    assert len(operators(fold(model, {"x": normal(2, 3, 4), "z": normal(2, 3, 4)}))) == 3


def test_branches_that_others_read_stay() -> None:
    nodes = [node("MatMul", "x w", "p"), node("MatMul", "x v", "q"), node("Add", "p q"), node("Relu", "q", "z")]
    model = net(nodes, {"x": [2, 3, 4]}, {"w": normal(4, 5), "v": normal(4, 5)}, ("y", "z"))
    result = fold(model, {"x": normal(2, 3, 4)})
    assert operators(result).count("MatMul") == 2
    nodes = [
        node("MatMul", "x w", "p"), node("MatMul", "x v", "q"), node("Add", "q a", "r"), node("Add", "p r"),
        node("Relu", "q", "z"),
    ]  # fmt: skip
    model = net(nodes, {"x": [2, 3, 4]}, {"w": normal(4, 5), "v": normal(4, 5), "a": normal(5)}, ("y", "z"))
    assert operators(fold(model, {"x": normal(2, 3, 4)})).count("MatMul") == 2
    nodes = [nodes[0], nodes[1], node("Add", "p q")]
    outputs = net(nodes, {"x": [2, 3, 4]}, {"w": normal(4, 5), "v": normal(4, 5)}, ("y", "q", "p"))
    assert operators(fold(outputs, {"x": normal(2, 3, 4)})).count("MatMul") == 2


def test_products_over_different_axes_are_not_added() -> None:
    nodes = [node("MatMul", "x w", "p"), node("MatMul", "v x", "q"), node("Add", "p q")]
    model = net(nodes, {"x": [2, 4, 4]}, {"w": normal(4, 4), "v": normal(4, 4)})
    assert len(operators(fold(model, {"x": normal(2, 4, 4)}))) == 3


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "nodes"), [("efficientnet_lite0", 94), ("minilm_l6", 218), ("ppocrv4_rec", 263), ("ppocrv4_det", 211)]
)
def test_real_models_keep_their_outputs(name: str, nodes: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from models import zoo

    entry = zoo.load_models()[name]
    model = model_io.load(entry.path)
    original = runtime.load(model, threads=1)
    samples = open_data(entry.folder / entry.calibration, input_specs(model)).spread(2)
    for item in parse("simplify,fold"):
        item.apply(model, CONTEXT)
    assert sum(1 for _ in model.graph.all_nodes()) <= nodes
    fidelity, _ = verify.measure(verify.Reference(original, samples), runtime.load(model, threads=1))
    assert fidelity.broken() is None
