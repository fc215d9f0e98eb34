"""Linear branches that are added."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import BN, batchnorm, fold, net, node, normal
from oracles import operators, run

FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


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


def test_a_branch_without_weight_or_with_a_bias_of_run_time_stays() -> None:
    nodes = [node("Gemm", "x v", "p", alpha=0.0), node("Gemm", "x w", "q", alpha=0.0), node("Add", "p q")]
    parts = {"v": normal(4, 4), "w": normal(4, 4)}
    assert "Add" in operators(fold(net(nodes, {"x": [3, 4]}, parts), {"x": normal(3, 4)}))
    nodes = [node("Conv", "x v a", "p"), node("Conv", "x w", "q"), node("Add", "p q")]
    parts = {"v": normal(4, 4, 1), "w": normal(4, 4, 1)}
    model = net(nodes, {"x": [1, 4, 5], "a": [4]}, parts)
    assert operators(fold(model, {"x": normal(1, 4, 5), "a": normal(4)})) == ["Conv", "Conv", "Add"]


def test_a_transposed_convolution_is_no_branch() -> None:
    nodes = [node("ConvTranspose", "x v", "p"), node("ConvTranspose", "x w", "q"), node("Add", "p q")]
    model = net(nodes, {"x": [1, 4, 5]}, {"v": normal(4, 4, 1), "w": normal(4, 4, 1)})
    assert operators(fold(model, {"x": normal(1, 4, 5)})) == ["ConvTranspose", "ConvTranspose", "Add"]


def test_a_scaled_identity_that_others_read_stays() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "x k", "m"), node("Add", "c m"), node("Relu", "m", "z")]
    model = net(nodes, {"x": [1, 4, 5]}, {"w": normal(4, 4, 1), "k": normal(4, 1)}, ("y", "z"))
    assert "Mul" in operators(fold(model, {"x": normal(1, 4, 5)}))


def test_constants_along_another_axis_are_no_branch() -> None:
    nodes = [node("Conv", "x w b", "c"), node("Mul", "x k", "m"), node("Add", "c m")]
    parts = {"w": normal(4, 4, 1), "b": normal(4), "k": normal(1, 4)}
    assert operators(fold(net(nodes, {"x": [1, 4, 4]}, parts), {"x": normal(1, 4, 4)})) == ["Conv", "Mul", "Add"]
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k", "m"), node("Add", "m x")]
    assert operators(fold(net(nodes, {"x": [1, 4, 4]}, parts), {"x": normal(1, 4, 4)})) == ["Conv", "Mul", "Add"]


def test_an_affine_map_of_another_value_is_no_branch() -> None:
    nodes = [node("Conv", "x w b", "c"), node("Mul", "u k", "m"), node("Add", "c m")]
    parts = {"w": normal(4, 4, 1), "b": normal(4), "k": normal(4, 1)}
    feeds = {"x": normal(1, 4, 5), "u": normal(1, 4, 5)}
    model = net(nodes, {"x": [1, 4, 5], "u": [1, 4, 5]}, parts)
    assert operators(fold(model, feeds)) == ["Conv", "Mul", "Add"]


def test_branches_that_are_not_added_stay() -> None:
    for op in ("Mul", "Max"):
        nodes = [node("Conv", "x v", "p"), node("Conv", "x w", "q"), node(op, "p q")]
        model = net(nodes, {"x": [1, 4, 5]}, {"v": normal(4, 4, 1), "w": normal(4, 4, 1)})
        assert operators(fold(model, {"x": normal(1, 4, 5)})) == ["Conv", "Conv", op]
    three = [node("Conv", "x v", "p"), node("Conv", "x w", "q"), node("Sum", "p q u")]
    model = net(three, {"x": [1, 4, 5], "u": [1, 4, 5]}, {"v": normal(4, 4, 1), "w": normal(4, 4, 1)})
    feeds = {"x": normal(1, 4, 5), "u": normal(1, 4, 5)}
    assert operators(fold(model, feeds)) == ["Conv", "Conv", "Sum"]


def test_a_low_rank_branch_that_others_read_stays() -> None:
    nodes = [
        node("MatMul", "x w", "p"),
        node("MatMul", "x a", "q"),
        node("MatMul", "q b", "r"),
        node("Add", "p r"),
        node("Tanh", "r", "z"),
    ]
    parts = {"w": normal(8, 8), "a": normal(8, 2), "b": normal(2, 8)}
    model = net(nodes, {"x": [2, 3, 8]}, parts, ("y", "z"))
    assert operators(fold(model, {"x": normal(2, 3, 8)})).count("MatMul") == 3
