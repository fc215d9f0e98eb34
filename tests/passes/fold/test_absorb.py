"""Affine maps behind and in front of linear operators."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import helper

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import BN, batchnorm, fold, net, node, normal, reasons, weights
from oracles import apply, operators
from strategies import Builder, Value, conv, conv_transpose, gemm, matmul

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


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


def test_an_operator_without_a_bias_that_is_no_product_keeps_its_offset_behind() -> None:
    nodes = [node("RMSNormalization", "x g", "m"), node("Add", "m b")]
    model = net(nodes, {"x": ["n", 4]}, {"g": normal(4), "b": normal(4)}, opset=23)
    assert operators(fold(model, {"x": normal(5, 4)})) == ["RMSNormalization", "Add"]


def test_matmul_and_add_become_gemm_only_where_they_are_matrices() -> None:
    nodes = [node("MatMul", "x w", "m"), node("Add", "m b")]
    parts = {"w": normal(4, 3), "b": normal(3)}
    assert operators(fold(net(nodes, {"x": ["n", 4]}, parts), {"x": normal(5, 4)})) == ["Gemm"]
    assert operators(fold(net(nodes, {"x": ["n", 2, 4]}, parts), {"x": normal(5, 2, 4)})) == ["MatMul", "Add"]
    assert operators(fold(net(nodes, {"x": None}, parts), {"x": normal(5, 2, 4)})) == ["MatMul", "Add"]  # type: ignore[dict-item]
    stack = {**parts, "w": normal(2, 4, 3)}
    assert operators(fold(net(nodes, {"x": [5, 4]}, stack), {"x": normal(5, 4)})) == ["MatMul", "Add"]
    rows = {**parts, "b": normal(3, 1)}
    assert operators(fold(net(nodes, {"x": [3, 4]}, rows), {"x": normal(3, 4)})) == ["MatMul", "Add"]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("steps", ["Mul k", "Add k", "Mul k;Add a", "Sub k;Div a"])
def test_batchnorm_takes_affine_maps_on_both_sides_of_its_mean(steps: str, behind: bool) -> None:
    nodes, at = [], "x"
    if behind:
        nodes.append(node("BatchNormalization", f"x {BN}", at := "n"))
    for k, step in enumerate(steps.split(";")):
        op, constant = step.split()
        nodes.append(node(op, f"{at} {constant}", f"v{k}"))
        at = f"v{k}"
    nodes.append(node("Tanh", at) if behind else node("BatchNormalization", f"{at} {BN}"))
    model = net(nodes, {"x": [2, 3, 4]}, {"k": normal(3, 1), "a": normal(3, 1), **batchnorm(3)})
    result = fold(model, {"x": normal(2, 3, 4)})
    assert operators(result) == ["BatchNormalization"] + ["Tanh"] * behind


def test_a_bias_that_cancels_is_written_all_the_same() -> None:
    b = normal(3)
    nodes = [node("Conv", "x w b", "c"), node("Sub", "c k")]
    model = net(nodes, {"x": [1, 4, 5]}, {"w": normal(3, 4, 1), "b": b, "k": b[:, None]})
    assert operators(fold(model, {"x": normal(1, 4, 5)})) == ["Conv"]


def test_a_bias_that_does_not_change_keeps_its_factor() -> None:
    nodes = [node("Mul", "x k", "m"), node("Gemm", "m w b", alpha=0.5, beta=3.0)]
    model = net(nodes, {"x": [2, 4]}, {"k": normal(4), "w": normal(4, 3), "b": normal(3)})
    assert operators(fold(model, {"x": normal(2, 4)})) == ["Gemm"]


@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ("Conv Add Sub", "Conv Add Sub"),
        ("Add Sub Conv", "Add Sub Conv"),
        ("Conv Shift Add Sub", "Conv Add Sub"),
        ("Conv Add Sub Shift", "Conv Add Sub Add"),
        ("Conv Add Sub Conv", "Conv Add Sub Conv"),
        ("Add Sub Scale Shift Pad", "Add Sub Add Conv"),
    ],
)
def test_a_large_number_that_is_added_and_subtracted_rounds_on_purpose(steps: str, left: str) -> None:
    operands = {"Add": "k", "Sub": "k", "Conv": "w b", "Pad": "w b", "Scale": "s", "Shift": "t"}
    names = {"Pad": "Conv", "Scale": "Mul", "Shift": "Add"}
    nodes = [
        node(names.get(s, s), f"v{k} {operands[s]}", f"v{k + 1}", **({"pads": [1, 0]} if s == "Pad" else {}))
        for k, s in enumerate(steps.split())
    ]
    parts = {
        "k": np.float32(1.5 * 2**23), "w": normal(4, 4, 1), "b": normal(4), "s": normal(4, 1), "t": normal(4, 1),
    }  # fmt: skip
    model = net(nodes, {"v0": [1, 4, 5]}, parts, (f"v{len(nodes)}",))
    assert operators(fold(model, {"v0": 9 * normal(1, 4, 5)})) == left.split()


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
    for op, constant in itertools.product(("Mul", "Add"), ((4,), (1, 1, 4), (4, 1, 1), (4, 4))):
        model = net(
            [node(op, "x k", "m"), node("Conv", "m w b")],
            {"x": [4, 4, 4]},
            {"k": normal(*constant), "w": normal(4, 4, 1), "b": normal(4)},
        )
        assert operators(fold(model, {"x": normal(4, 4, 4)})) == [op, "Conv"]


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


@pytest.mark.parametrize("shown", ["z", "m"])
def test_a_value_between_affine_maps_that_others_read_stays(shown: str) -> None:
    nodes = [node("Mul", "x k", "m"), node("Add", "m a", "n"), node("Conv", "n w b"), node("Relu", "m", "z")]
    parts = {"k": normal(3, 1), "a": normal(3, 1), "w": normal(2, 3, 1), "b": normal(2)}
    model = net(nodes if shown == "z" else nodes[:3], {"x": [1, 3, 4]}, parts, ("y", shown))
    assert operators(fold(model, {"x": normal(1, 3, 4)}))[:2] == ["Mul", "Conv"]


@pytest.mark.parametrize(
    ("op", "data", "constant", "weight", "kept"),
    [
        ("Conv", (1, 1, 4), (1, 3, 1), (2, 3, 1), True),
        ("Conv", (1, 3, 4), (1,), (2, 3, 1), False),
        ("Gemm", (3, 1), (4,), (4, 2), True),
        ("MatMul", (), (1,), (1, 2), True),
        ("MatMul", (), (1,), (3, 1, 2), True),
    ],
)
def test_constants_that_may_broadcast_data_of_unknown_rank_stay_in_front(
    op: str, data: tuple[int, ...], constant: tuple[int, ...], weight: tuple[int, ...], kept: bool
) -> None:
    nodes = [node("Mul", "x k", "m"), node(op, "m w")]
    model = net(nodes, {"x": None}, {"k": normal(*constant), "w": normal(*weight)})  # type: ignore[dict-item]
    assert ("Mul" in operators(fold(model, {"x": np.asarray(normal(*data))}))) is kept


def test_batchnorm_of_unknown_rank_stays() -> None:
    for nodes in (
        [node("Relu", "x", "r"), node("BatchNormalization", f"r {BN}")],
        [node("BatchNormalization", f"x {BN}", "b"), node("Conv", "b w")],
    ):
        model = net(nodes, {"x": None}, {"w": normal(2, 3, 1), **batchnorm(3)})  # type: ignore[dict-item]
        assert operators(fold(model, {"x": normal(2, 3, 4)})) == [n.op_type for n in nodes]


@pytest.mark.parametrize("data", [(2, 3, 4), (3, 4)])
def test_batchnorm_behind_a_stack_of_matrices_may_not_be_per_output_channel(data: tuple[int, ...]) -> None:
    """Behind data of unknown rank; for a vector alone axis 1 is the last."""
    nodes = [node("MatMul", "x w", "m"), node("BatchNormalization", f"m {BN}")]
    model = net(nodes, {"x": None}, {"w": normal(2, 4, 3), **batchnorm(3)})  # type: ignore[dict-item]
    assert operators(fold(model, {"x": normal(*data)})) == ["MatMul", "BatchNormalization"]
