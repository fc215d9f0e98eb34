"""Constants per channel between convolutions: BatchNormalization where, and only where, that saves copies."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import net, node, normal
from oracles import CONTEXT, apply, assert_same, operators

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.pipeline import parse

X = normal(1, 16, 12, 12)
WEIGHTS = {
    "w1": normal(32, 16, 1, 1),
    "b1": normal(32),
    "w2": normal(32, 1, 3, 3),
    "b2": normal(32),
    "scalar": np.float32([0.7]),
    "channels": normal(32, 1, 1),
    "rows": normal(12, 1),
    "two": np.float32(2),
    "magic": np.float32([1.5 * 2**23]),
    "infinite": np.float32([np.inf]),
}


def between(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """Nodes from a to b between a convolution and a padded one, which cannot take an offset in."""
    chain = [
        node("Conv", "x w1 b1", "c"),
        node("Relu", "c", "a"),
        *nodes,
        node("Conv", "b w2 b2", "y", pads=[1, 1, 1, 1], group=32),
    ]
    return net(chain, {"x": X.shape}, WEIGHTS, {"y": (1, 32, 12, 12)})


def executed(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in runtime.optimized(model_io.load(model), threads=1).graph]


blocked = pytest.mark.skipif(
    "ReorderOutput" not in executed(between(node("Identity", "a", "b"))), reason="no kernels on blocks of channels here"
)


@blocked
@pytest.mark.parametrize(
    "nodes",
    [
        [node("Add", "a scalar", "b")],
        [node("Sub", "scalar a", "b")],
        [node("Mul", "a channels", "m"), node("Add", "m scalar", "b")],
    ],
)
def test_a_constant_between_convolutions(nodes: list[onnx.NodeProto]) -> None:
    model = between(*nodes)
    result, _ = apply(model, "fuse")
    assert operators(result) == ["Conv", "Relu", "BatchNormalization", "Conv"]
    assert_same(model, result, {"x": X}, 1e-6)
    assert len(executed(result)) < len(executed(model))
    again, _ = apply(result, "simplify,fold,fuse")
    assert operators(again) == operators(result)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Add", "a rows", "b")],
        [node("Exp", "a", "e"), node("Add", "e scalar", "b")],
        [node("Add", "a scalar", "s"), node("Exp", "s", "b")],
        [node("Mul", "a a", "q"), node("Softplus", "q", "p"), node("Add", "p scalar", "b")],
    ],
)
def test_constants_that_are_copied_anyway_stay(nodes: list[onnx.NodeProto]) -> None:
    assert "BatchNormalization" not in operators(apply(between(*nodes), "fuse")[0])


def test_rounding_on_purpose_stays() -> None:
    """x + 1.5 * 2**23 has no digits behind the point."""
    model = between(node("Add", "a magic", "r"), node("Sub", "r magic", "b"))
    result, _ = apply(model, "fuse")
    assert operators(result) == operators(model)
    assert_same(model, result, {"x": X}, 1e-6)


def test_infinite_constants_stay() -> None:
    """Their products need not be what they are one after the other."""
    model = between(node("Mul", "a infinite", "m"), node("Add", "m scalar", "b"))
    assert operators(apply(model, "fuse")[0]) == operators(model)


def test_what_varies_along_the_batch_is_not_per_channel() -> None:
    """With one axis behind the channels, the batch is where the channels are with two."""
    nodes = [node("Conv", "x w b", "c"), node("Add", "c shift", "a"), node("Conv", "a w b", "y", pads=[1, 1])]
    weights = {"w": normal(3, 3, 3), "b": normal(3), "shift": normal(3, 1, 1)}
    model = net(nodes, {"x": (3, 3, 9)}, weights, ["y"])
    result, _ = apply(model, "fuse")
    assert operators(result) == operators(model)
    assert_same(model, result, {"x": normal(3, 3, 9)}, 1e-6)


def test_other_targets_are_left_alone() -> None:
    model = model_io.load(between(node("Add", "a scalar", "b")))
    (fuse,) = parse("fuse")
    context = type(CONTEXT)(CONTEXT.calibration, synthetic=True, target="openvino")
    assert not fuse.apply(model, context).stats
