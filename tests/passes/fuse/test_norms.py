"""Normalizations are found in all their forms, and nothing else is taken for one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import net, node, normal
from oracles import apply, assert_same, operators

C = 8
SHAPE = (2, 3, C)


def norm(
    *,
    root: str = "sqrt",
    square: str = "pow",
    centred: bool = True,
    scale: tuple[int, ...] | None = (C,),
    bias: tuple[int, ...] | None = (C,),
    axes: tuple[int, ...] = (-1,),
    epsilon: float = 1e-5,
    shape: tuple[Any, ...] = SHAPE,
    cast: bool = False,
    opset: int = 17,
    keepdims: int = 1,
) -> onnx.ModelProto:
    """A decomposed normalization of the given form."""
    kind = np.float16 if cast else np.float32
    weights: dict[str, np.ndarray] = {"two": np.float32(2), "eps": np.float32(epsilon), "one": np.float32(1)}
    weights["half"] = np.float32(-0.5)
    nodes = []
    x = "x"
    if cast:
        nodes.append(node("Cast", "x", "x32", to=TensorProto.FLOAT))
        x = "x32"

    def mean(of: str, result: str) -> None:
        if opset < 18:
            nodes.append(node("ReduceMean", of, result, axes=list(axes), keepdims=keepdims))
        else:
            weights["axes"] = np.array(axes, np.int64)
            nodes.append(node("ReduceMean", f"{of} axes", result, keepdims=keepdims))

    d = x
    if centred:
        mean(x, "mu")
        nodes.append(node("Sub", f"{x} mu", "d"))
        d = "d"
    nodes.append(node("Pow", f"{d} two", "dd") if square == "pow" else node("Mul", f"{d} {d}", "dd"))
    mean("dd", "var")
    nodes.append(node("Add", "var eps", "ve"))
    if root == "pow":
        nodes.append(node("Pow", "ve half", "r"))
        nodes.append(node("Mul", f"{d} r", "n"))
    else:
        nodes.append(node("Sqrt", "ve", "s"))
        if root == "sqrt":
            nodes.append(node("Div", f"{d} s", "n"))
        else:
            nodes.append(node("Reciprocal", "s", "r") if root == "reciprocal" else node("Div", "one s", "r"))
            nodes.append(node("Mul", f"{d} r", "n"))
    last = "n"
    if cast:
        nodes.append(node("Cast", last, "n16", to=TensorProto.FLOAT16))
        last = "n16"
    if scale is not None:
        weights["scale"] = normal(*scale).astype(kind)
        nodes.append(node("Mul", f"{last} scale", "scaled"))
        last = "scaled"
    if bias is not None:
        weights["bias"] = normal(*bias).astype(kind)
        nodes.append(node("Add", f"{last} bias", "shifted"))
        last = "shifted"
    nodes[-1].output[0] = "y"
    return net(
        nodes,
        {"x": shape},
        weights,
        {"y": shape},
        opset=opset,
        dtype=TensorProto.FLOAT16 if cast else TensorProto.FLOAT,
    )


def fused(model: onnx.ModelProto, x: np.ndarray | None = None) -> onnx.ModelProto:
    result, _ = apply(model, "fuse")
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = normal(*shape) if x is None else x
    half = model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    for factor in (1.0, 30.0, 0.01, 1e-3):
        data = (factor * x).astype(np.float16 if half else np.float32)
        assert_same(model, result, {"x": data}, 4e-3 if half else 1e-5)
    return result


@pytest.mark.parametrize("root", ["sqrt", "pow", "reciprocal", "one over"])
@pytest.mark.parametrize("square", ["pow", "mul"])
@pytest.mark.parametrize("scale", [None, (C,), (1, 1, C)])
@pytest.mark.parametrize("bias", [None, (C,)])
def test_layer_normalization(
    root: str, square: str, scale: tuple[int, ...] | None, bias: tuple[int, ...] | None
) -> None:
    result = fused(norm(root=root, square=square, scale=scale, bias=bias))
    assert operators(result) == ["LayerNormalization"]
    (found,) = result.graph.node
    assert len(found.input) == (3 if bias else 2)
    assert onnx.helper.get_node_attr_value(found, "epsilon") == pytest.approx(1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-6, 1e-3, 0.1])
def test_epsilon(epsilon: float) -> None:
    (found,) = fused(norm(epsilon=epsilon)).graph.node
    assert onnx.helper.get_node_attr_value(found, "epsilon") == pytest.approx(epsilon, rel=1e-6, abs=1e-15)


def test_the_opset_is_raised_to_that_of_the_operator() -> None:
    for opset, after in ((12, 17), (13, 17), (17, 17), (18, 18)):
        result = fused(norm(opset=opset))
        assert operators(result) == ["LayerNormalization"]
        assert result.opset_import[0].version == after


def test_rms_normalization_where_the_opset_has_it() -> None:
    plain = {"centred": False, "bias": None}
    assert operators(fused(norm(opset=23, **plain))) == ["RMSNormalization"]
    assert "RMSNormalization" not in operators(fused(norm(opset=20, **plain)))
    assert operators(fused(norm(opset=23, centred=False))) == ["RMSNormalization", "Add"]


def test_several_axes() -> None:
    result = fused(norm(shape=(2, 4, 3, 5), axes=(2, 3), scale=(3, 5), bias=(3, 5)))
    assert operators(result) == ["LayerNormalization"]
    assert onnx.helper.get_node_attr_value(result.graph.node[0], "axis") == 2


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), ("n", 4, "h", "w")])
@pytest.mark.parametrize("bias", [None, (4, 1, 1)])
def test_instance_normalization(shape: tuple[Any, ...], bias: tuple[int, ...] | None) -> None:
    result = fused(norm(shape=shape, axes=(2, 3), scale=(4, 1, 1), bias=bias), normal(2, 4, 3, 5))
    assert operators(result) == ["InstanceNormalization"]


def test_symbolic_sizes() -> None:
    assert operators(fused(norm(shape=("batch", "length", C)))) == ["LayerNormalization"]


def test_casts_are_part_of_it() -> None:
    result = fused(norm(cast=True))
    assert operators(result) == ["LayerNormalization"]


def test_what_the_mean_shifts_away_goes_too() -> None:
    """A normalization does not see an offset, and takes a factor into eps."""
    model = norm()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(3), "three"))
    model.graph.node.insert(0, node("Mul", "x three", "x3"))
    for user in model.graph.node[1:]:
        user.input[:] = ["x3" if name == "x" else name for name in user.input]
    (found,) = fused(model).graph.node
    assert onnx.helper.get_node_attr_value(found, "epsilon") == pytest.approx(1e-5 / 9, rel=1e-5)


HOMOGENEOUS = {
    "length": ["l = ReduceL2 x", "y = Div x l"],
    "root of the squares": ["q = Mul x x", "v = ReduceMean q", "e = Add v eps", "s = Sqrt e", "y = Div x s"],
    "half the mean": ["m = ReduceMean x", "h = Mul m half", "d = Sub x h", "q = Mul d d", "v = ReduceMean q",
                      "e = Add v eps", "s = Sqrt e", "y = Div d s"],
    "the mean back": ["m = ReduceMean x", "d = Sub x m", "q = Mul d d", "v = ReduceMean q", "s = Sqrt v",
                      "n = Div d s", "o = Div m s", "y = Add n o"],
    "a tiny root": ["q = Mul x x", "v = ReduceMean q", "e = Add v eps", "s = Sqrt e", "d = Div x s", "y = Mul d tiny"],
}  # fmt: skip


@pytest.mark.parametrize("shape", [(1, C), (1, 1, C), (4, C)])
@pytest.mark.parametrize("what", HOMOGENEOUS)
def test_one_row_of_data_is_no_reason_to_take_another_function_for_it(what: str, shape: tuple[int, ...]) -> None:
    """At one point, a scale for each element makes every one of them the same."""
    nodes = []
    for line in HOMOGENEOUS[what]:
        result, op, *operands = line.replace("= ", "").split()
        nodes.append(node(op, " ".join(operands), result, **({"axes": [-1]} if op.startswith("Reduce") else {})))
    model = net(
        nodes,
        {"x": shape},
        {"eps": np.float32(1e-5), "half": np.float32(0.5), "tiny": np.float32(1e-12)},
        {"y": shape},
        opset=17,
    )
    assert operators(fused(model)) == operators(model)


def test_a_constant_that_repeats_the_data_stays() -> None:
    """Of one row it would make two, all alike."""
    model = norm(shape=("n", C), bias=(2, C))
    bias = next(t for t in model.graph.initializer if t.name == "bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.tile(normal(1, C), (2, 1)), "bias"))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert operators(fused(model, normal(1, C))) == ["LayerNormalization", "Add"]


@pytest.mark.parametrize(("there", "found"), [(TensorProto.DOUBLE, True), (TensorProto.FLOAT16, False)])
def test_a_type_with_fewer_digits_is_meant(there: int, found: bool) -> None:
    model = norm(scale=None, bias=None)
    for item in model.graph.node:
        item.input[:] = ["t" if name == "x" else name for name in item.input]
        item.output[:] = ["z" if name == "y" else name for name in item.output]
    model.graph.node.insert(0, node("Cast", "x", "t", to=there))
    model.graph.node.append(node("Cast", "z", "y", to=TensorProto.FLOAT))
    for array in model.graph.initializer:
        array.CopyFrom(
            onnx.numpy_helper.from_array(
                onnx.numpy_helper.to_array(array).astype(onnx.helper.tensor_dtype_to_np_dtype(there)), array.name
            )
        )
    assert (operators(apply(model, "fuse")[0]) == ["LayerNormalization"]) == found


def test_a_mean_that_broadcasts_along_another_axis_is_another_function() -> None:
    model = norm(shape=(C, C), keepdims=0)
    assert operators(fused(model)) == operators(model)


def test_a_mean_of_everything_stays() -> None:
    nodes = [node("ReduceMean", "x", "m", keepdims=1), node("Sub", "x m", "d"), node("ReduceL2", "d", "l", keepdims=1)]
    model = net([*nodes, node("Div", "d l")], {"x": SHAPE}, {}, {"y": SHAPE})
    assert operators(fused(model)) == operators(model)


def test_axes_of_unknown_size_have_no_scale() -> None:
    model = norm(shape=("n", "s", C), axes=(-2, -1))
    assert operators(fused(model, normal(2, 3, C))) == operators(model)


def test_the_channels_of_images_are_in_front_of_what_is_normalized() -> None:
    result = fused(norm(shape=(2, 4, 5), axes=(1, 2), scale=None, bias=None))
    assert operators(result) == ["LayerNormalization"]


def test_a_number_of_elements_that_may_not_be_theirs_stays() -> None:
    """The mean of twelve elements only."""
    lines = ["s = ReduceSum x axes", "m = Div s twelve", "d = Sub x m", "q = Mul d d", "v = ReduceMean q",
             "e = Add v eps", "r = Sqrt e", "y = Div d r"]  # fmt: skip
    nodes = []
    for line in lines:
        result, op, *operands = line.replace("= ", "").split()
        nodes.append(node(op, " ".join(operands), result, **({"axes": [2, 3]} if op == "ReduceMean" else {})))
    weights = {"axes": np.array([2, 3]), "twelve": np.float32(12), "eps": np.float32(1e-5)}
    model = net(nodes, {"x": ("n", 4, "h", "w")}, weights, {"y": ("n", 4, "h", "w")})
    assert operators(fused(model, normal(2, 4, 3, 5))) == operators(model)


def test_images_of_half_precision_are_normalized_in_single_precision() -> None:
    """There is no kernel for the others."""
    model = norm(shape=("n", 4, "h", "w"), axes=(2, 3), scale=(4, 1, 1), bias=(4, 1, 1), cast=True)
    result = fused(model, normal(2, 4, 3, 5))
    assert operators(result) == ["Cast", "InstanceNormalization", "Cast", "Mul", "Add"]


def test_data_that_is_cast_stays_what_it_is_cast_to() -> None:
    model = norm(cast=True, scale=None, bias=None)
    del model.graph.node[-1]
    model.graph.node[-1].output[0] = "y"
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    assert operators(fused(model)) == ["Cast", "LayerNormalization"]


def test_double_precision_is_left_alone() -> None:
    model = norm()
    for array in model.graph.initializer:
        array.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(array).astype(np.float64), array.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    assert operators(apply(model, "fuse")[0]) == operators(model)


def edited(change: str) -> onnx.ModelProto:
    """A layer normalization with something about it that makes it another function."""
    model = norm(shape=(2, C, C) if change == "other axis" else SHAPE)
    nodes = {n.output[0]: n for n in model.graph.node}
    weights = {t.name: t for t in model.graph.initializer}
    match change:
        case "eps outside the root" | "eps outside the root that only small data shows":
            if change != "eps outside the root":
                weights["eps"].CopyFrom(onnx.numpy_helper.from_array(np.float32(1e-10), "eps"))
            nodes["ve"].op_type, nodes["ve"].input[:] = "Sqrt", ["var"]
            nodes["s"].op_type, nodes["s"].input[:] = "Add", ["ve", "eps"]
        case "power of 2.1":
            weights["two"].CopyFrom(onnx.numpy_helper.from_array(np.float32(2.1), "two"))
        case "other axis":
            for name in ("mu", "var"):
                nodes[name].attribute[0].ints[:] = [1]
        case "two axes":
            nodes["var"].attribute[0].ints[:] = [0]
        case "bias of every position":
            weights["bias"].CopyFrom(onnx.numpy_helper.from_array(normal(3, C), "bias"))
        case "scale of every sample":
            weights["scale"].CopyFrom(onnx.numpy_helper.from_array(normal(2, 1, C), "scale"))
        case "not the mean":
            nodes["mu"].op_type = "ReduceMax"
        case "eps that only rows of one number show":
            weights["eps"].CopyFrom(onnx.numpy_helper.from_array(np.float32(1e-30), "eps"))
        case "negative eps":
            weights["eps"].CopyFrom(onnx.numpy_helper.from_array(np.float32(-1e-8), "eps"))
    return model


@pytest.mark.parametrize(
    "change",
    [
        "eps outside the root",
        "eps outside the root that only small data shows",
        "eps that only rows of one number show",
        "power of 2.1",
        "other axis",
        "two axes",
        "not the mean",
        "negative eps",
    ],
)
def test_what_is_close_to_a_normalization_is_left_alone(change: str) -> None:
    result, _ = apply(edited(change), "fuse")
    assert "LayerNormalization" not in operators(result)


@pytest.mark.parametrize("change", ["bias of every position", "scale of every sample"])
def test_constants_that_do_not_belong_to_it_stay(change: str) -> None:
    result = fused(edited(change))
    assert operators(result) in (["LayerNormalization", "Add"], ["LayerNormalization", "Mul", "Add"])


def test_values_that_others_read_stay() -> None:
    model = norm()
    model.graph.output.append(onnx.helper.make_tensor_value_info("var", TensorProto.FLOAT, (2, 3, 1)))
    assert "LayerNormalization" not in operators(apply(model, "fuse")[0])
