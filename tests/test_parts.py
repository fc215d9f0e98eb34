"""Elementwise operators move through Split and Concat where that saves nodes, and change no bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from nets import net, node, normal
from oracles import apply, operators, run

X = normal(2, 4, 6)
CONSTANTS = {"sizes": np.array([2, 4]), "low": np.float32(-0.5), "high": np.float32(0.5), "row": normal(1)}


def simplified(model: onnx.ModelProto) -> list[str]:
    result, _ = apply(model, "simplify")
    want, got = run(model, {"x": X}), run(result, {"x": X})
    assert list(want) == list(got)
    assert all(want[name].tobytes() == got[name].tobytes() for name in want)
    again, _ = apply(result, "simplify")
    assert operators(again) == operators(result)
    return operators(result)


def halves(*nodes: onnx.NodeProto, outputs: tuple[str, ...] = ("y", "z")) -> onnx.ModelProto:
    """x split into a (2, 4, 2) and b (2, 4, 4), and ``nodes`` that make y and z of them."""
    return net([node("Split", "x sizes", "a b", axis=2), *nodes], {"x": ["n", 4, 6]}, CONSTANTS, outputs)


@pytest.mark.parametrize(
    ("op", "operands", "attributes"),
    [
        ("Relu", "{}", {}),
        ("LeakyRelu", "{}", {"alpha": 0.25}),
        ("Clip", "{} low high", {}),
        ("Cast", "{}", {"to": onnx.TensorProto.DOUBLE}),
        ("Sub", "low {}", {}),
        ("Less", "{} high", {}),
    ],
)
def test_what_all_parts_go_through_is_done_once(op: str, operands: str, attributes: dict[str, Any]) -> None:
    model = halves(node(op, operands.format("a"), "y", **attributes), node(op, operands.format("b"), "z", **attributes))
    kind = {"Cast": onnx.TensorProto.DOUBLE, "Less": onnx.TensorProto.BOOL}.get(op, onnx.TensorProto.FLOAT)
    for output in model.graph.output:
        output.type.tensor_type.elem_type = kind
    assert simplified(model) == [op, "Split"]


def test_a_run_of_nodes_moves_whole() -> None:
    nodes = [node("Relu", "a", "c"), node("Relu", "b", "d"), node("Neg", "c"), node("Neg", "d", "z")]
    assert simplified(halves(*nodes)) == ["Relu", "Neg", "Split"]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Relu", "a"), node("Neg", "b", "z")],
        [node("LeakyRelu", "a", alpha=0.5), node("LeakyRelu", "b", "z", alpha=0.25)],
        [node("Sub", "a low"), node("Sub", "low b", "z")],
        [node("Sub", "a low"), node("Sub", "b high", "z")],
        [node("Mul", "a a"), node("Mul", "b b", "z")],
        [node("Sub", "a row"), node("Sub", "b row", "z")],
    ],
    ids=["other operators", "other attributes", "other operands", "other constants", "twice", "a constant with axes"],
)
def test_parts_that_go_through_different_things_stay(nodes: list[onnx.NodeProto]) -> None:
    model = halves(*nodes)
    assert simplified(model) == operators(model)


def test_parts_that_are_read_elsewhere_stay() -> None:
    nodes = [node("Relu", "a"), node("Relu", "b", "z")]
    for model in (
        halves(*nodes, outputs=("y", "z", "a")),
        halves(*nodes, node("Exp", "b", "w"), outputs=("y", "z", "w")),
    ):
        assert simplified(model) == operators(model)
    one = halves(nodes[0], outputs=("y",))
    assert simplified(one) == operators(one)


def table(*lengths: int) -> dict[str, np.ndarray]:
    return {f"c{k}": normal(2, n, 6) for k, n in enumerate(lengths)}


def joined(
    op: str = "Add", first: str = "c0 x c1", second: str = "c2 p c3", axes: tuple[int, int] = (1, -2)
) -> onnx.ModelProto:
    """Class tokens around x, and positions for all of it."""
    weights = {**table(1, 3, 1, 3), "p": normal(2, 4, 6)}
    nodes = [node("Concat", first, "tokens", axis=axes[0]), node("Concat", second, "positions", axis=axes[1])]
    if "r" in second.split():
        nodes.insert(0, node("Relu", "x", "r"))
    return net([*nodes, node(op, "tokens positions")], {"x": X.shape}, weights, ("y",))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Max"])
def test_what_is_constant_on_both_sides_is_computed(op: str) -> None:
    # The positions are no table of their own, as storing one would repeat what the tokens are joined from.
    assert simplified(joined(op, second="c0 p c1")) == [op, "Concat"]
    assert simplified(joined(op, second="c2 r c3")) == ["Relu", op, "Concat"]


@pytest.mark.parametrize(
    ("first", "second"),
    [("c0 x c1", "c2 c3 r"), ("c0 x c1", "c3 r c2"), ("c0 x x", "c2 r r"), ("c0 x c1", "r p")],
    ids=["other parts are computed", "other sizes", "too many are computed", "other numbers of parts"],
)
def test_other_joins_stay(first: str, second: str) -> None:
    model = joined(first=first, second=second)
    assert simplified(model) == operators(model)


def test_a_join_that_is_read_elsewhere_stays() -> None:
    model = joined()
    model.graph.output.append(onnx.helper.make_tensor_value_info("tokens", onnx.TensorProto.FLOAT, None))
    assert simplified(model)[0] == "Concat"


def test_joins_along_other_axes_stay() -> None:
    nodes = [node("Concat", "x c", "l", axis=1), node("Concat", "d e", "r", axis=0), node("Mul", "l r")]
    weights = {"c": normal(1, 1, 6), "d": normal(1, 1, 6), "e": normal(1, 1, 6)}
    nodes.insert(0, node("Relu", "v", "x"))
    model = net(nodes, {"v": [1, 1, 6]}, weights, ("y",))
    model.graph.node[2].input[0] = "x"
    result, _ = apply(model, "simplify")
    assert operators(result) == ["Relu", "Concat", "Concat", "Mul"]
    feeds = {"v": normal(1, 1, 6)}
    assert run(model, feeds)["y"].tobytes() == run(result, feeds)["y"].tobytes()


def test_constants_that_others_read_are_not_computed_again() -> None:
    """They would stay, and what they amount to together would come on top."""
    model = joined(second="c2 r c3")
    model.graph.node.append(node("Mul", "x c0", "z"))
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, None))
    assert simplified(model) == operators(model)
