"""The pass as a whole: what is left after it, and what its options do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import net, node, normal
from oracles import apply, assert_same, operators

from onnxslim.errors import UsageError
from onnxslim.pipeline import complete, parse

X = normal(2, 3, 6, 6)


def block(opset: int = 12, **options: bool) -> onnx.ModelProto:
    """Convolutions around a hard swish as Paddle writes it."""
    weights = {
        "w1": normal(4, 3, 3, 3), "b1": normal(4), "w2": normal(5, 4, 1, 1), "b2": normal(5),
        "three": np.float32(3), "zero": np.float32(0), "six": np.float32(6),
    }  # fmt: skip
    nodes = [
        node("Conv", "x w1 b1", "c", pads=[1, 1, 1, 1]),
        node("Add", "c three", "s"),
        node("Clip", "s zero six", "l"),
        node("Mul", "c l", "m"),
        node("Div", "m six", "d"),
        node("Conv", "d w2 b2", "y"),
    ]
    return net(nodes, {"x": X.shape}, weights, {"y": (2, 5, 6, 6)}, opset=opset)


@pytest.mark.parametrize("passes", ["fuse", "simplify,fuse", "simplify,fold,fuse", "fuse,fold"])
def test_the_factor_that_fold_has_moved_comes_back(passes: str) -> None:
    model = block()
    result, _ = apply(model, passes)
    assert operators(result) == ["Conv", "HardSwish", "Conv"]
    assert_same(model, result, {"x": X}, 1e-5)
    again, outcomes = apply(result, passes)
    assert again.SerializeToString(deterministic=True) == apply(result, "")[0].SerializeToString(deterministic=True)
    assert not any(outcome.stats for outcome in outcomes)


def test_what_is_spelled_out_leaves_its_factor_to_the_weights() -> None:
    """As many nodes as before, but one of them a factor, which goes into the convolution behind it."""
    model = block()
    result, _ = apply(model, "simplify,fold,fuse(opset=0)")
    assert operators(result) == ["Conv", "HardSigmoid", "Mul", "Conv"]
    assert_same(model, result, {"x": X}, 1e-5)


def test_nothing_to_do_changes_nothing() -> None:
    model = net([node("Relu", "x")], {"x": (2, 3)}, {}, {"y": (2, 3)}, opset=12)
    result, (outcome,) = apply(model, "fuse")
    assert result.SerializeToString(deterministic=True) == apply(model, "")[0].SerializeToString(deterministic=True)
    assert not outcome.stats


def test_a_model_that_cannot_be_raised_uses_what_it_has() -> None:
    model = block(opset=12)
    model.graph.node.append(node("Hardmax", "y", "z", axis=1))
    model.graph.node[-1].op_type = "Dropout"
    model.graph.node[-1].attribute.clear()
    model.graph.node[-1].output.append("mask")
    for name, kind in (("z", onnx.TensorProto.FLOAT), ("mask", onnx.TensorProto.BOOL)):
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, (2, 5, 6, 6)))
    result, _ = apply(model, "fuse")
    assert_same(model, result, {"x": X}, 1e-5)


@pytest.mark.parametrize(("opset", "after"), [(12, 12), (18, 18), (19, 20)])
def test_a_pool_is_not_raised_to_a_slower_version(opset: int, after: int) -> None:
    weights = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    nodes = [
        node("AveragePool", "x", "p", kernel_shape=[2, 2]),
        node("Div", "p root", "a"),
        node("Erf", "a", "b"),
        node("Add", "b one", "c"),
        node("Mul", "p c", "d"),
        node("Mul", "d half"),
    ]
    model = net(nodes, {"x": X.shape}, weights, {"y": (2, 3, 5, 5)}, opset=opset)
    result, _ = apply(model, "fuse")
    assert result.opset_import[0].version == after
    assert ("Gelu" in operators(result)) == (after == 20)


def test_options() -> None:
    assert str(parse("fuse(opset=0)")[0]) == "fuse(opset=0)"
    assert [item.name for item in complete(parse("fuse"))] == ["simplify", "fold", "fuse"]
    with pytest.raises(UsageError, match="opset=99"):
        parse("fuse(opset=99)")


def test_an_old_operator_set_is_left_alone() -> None:
    model = net([node("Relu", "x")], {"x": (2, 3)}, {}, {"y": (2, 3)}, opset=6)
    assert apply(model, "fuse")[1][0].skipped
