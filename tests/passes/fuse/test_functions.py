"""Activation functions are found in all their forms, and nothing else is taken for one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import net, node
from oracles import apply, assert_same, operators

X = np.concatenate([np.linspace(-12, 12, 238), [0.0, -0.0]]).astype(np.float32).reshape(2, 4, 30)


def build(lines: Sequence[str], opset: int = 20, dtype: int = TensorProto.FLOAT, rank: int = 3) -> onnx.ModelProto:
    """A model from lines ``result = Operator operand ...``; numbers are constants, x is the input, y the output."""
    kind = np.float32 if dtype == TensorProto.FLOAT else np.float16 if dtype == TensorProto.FLOAT16 else np.float64
    weights: dict[str, np.ndarray] = {}
    nodes = []
    for line in lines:
        result, _, right = line.partition(" = ")
        op, *operands = right.split()
        for operand in operands:
            if operand[0] in "-.0123456789":
                weights[operand] = np.array(float(operand), kind)
        nodes.append(node(op, " ".join(operands), result))
    return net(nodes, {"x": X.shape[:rank]}, weights, {"y": X.shape[:rank]}, opset=opset, dtype=dtype)


def fused(lines: Sequence[str], **settings: int) -> list[str]:
    model = build(lines, **settings)
    result, _ = apply(model, "fuse")
    x = X.astype(onnx.helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type))
    assert_same(model, result, {"x": x}, 3e-3 if x.dtype == np.float16 else 2e-6)
    return operators(result)


ROOT2, ROOT_HALF, ROOT_2_PI = "1.4142135", "0.70710678", "0.7978845608"
FORMS = {
    "Gelu": [
        [f"a = Div x {ROOT2}", "b = Erf a", "c = Add b 1", "d = Mul x c", "y = Mul d 0.5"],
        [f"a = Mul x {ROOT_HALF}", "b = Erf a", "c = Add 1 b", "d = Mul c 0.5", "y = Mul x d"],
        [f"a = Mul x {ROOT_HALF}", "b = Erf a", "c = Add b 1", "h = Mul 0.5 x", "y = Mul c h"],
        [f"a = Mul x {ROOT_HALF}", "b = Erf a", "c = Mul b x", "d = Add c x", "y = Div d 2"],
        ["n = Neg x", f"a = Mul n {ROOT_HALF}", "b = Erf a", "c = Sub 1 b", "h = Mul 0.5 x", "y = Mul c h"],
        ["p = Pow x 3", "q = Mul p 0.044715", "r = Add x q", f"s = Mul r {ROOT_2_PI}", "t = Tanh s", "u = Add t 1",
         "h = Mul x 0.5", "y = Mul h u"],
        ["o = Mul x x", "p = Mul o 0.044715", "q = Add p 1", f"r = Mul x {ROOT_2_PI}", "s = Mul r q", "t = Tanh s",
         "u = Add 1 t", "v = Mul u x", "y = Mul v 0.5"],
    ],
    "HardSwish": [
        ["a = Add x 3", "b = Clip a 0 6", "c = Mul x b", "y = Div c 6"],
        ["a = Add x 3", "b = Clip a 0 6", "c = Div b 6", "y = Mul c x"],
        ["a = Add 3 x", "b = Relu a", "c = Min b 6", "d = Mul c 0.16666667", "y = Mul d x"],
        ["a = Mul x 0.16666667", "b = Add a 0.5", "c = Clip b 0 1", "y = Mul c x"],
    ],
    "HardSigmoid": [
        ["a = Add x 3", "b = Clip a 0 6", "y = Div b 6"],
        ["a = Mul x 0.2", "b = Add a 0.5", "c = Max b 0", "y = Min c 1"],
    ],
    "Softplus": [
        ["a = Exp x", "b = Add a 1", "y = Log b"],
        ["r = Relu x", "a = Abs x", "n = Neg a", "e = Exp n", "p = Add e 1", "l = Log p", "y = Add r l"],
    ],
    "Mish": [
        ["a = Softplus x", "b = Tanh a", "y = Mul x b"],
        ["a = Exp x", "b = Add 1 a", "c = Log b", "d = Tanh c", "y = Mul d x"],
    ],
    "Sigmoid": [
        ["a = Neg x", "b = Exp a", "c = Add b 1", "y = Reciprocal c"],
        ["a = Neg x", "b = Exp a", "c = Add b 1", "y = Div 1 c"],
    ],
    "Tanh": [["a = Mul x 2", "b = Sigmoid a", "c = Mul b 2", "y = Sub c 1"]],
    "LeakyRelu": [
        ["a = Mul x 0.1", "y = Max x a"],
        ["a = Relu x", "n = Neg x", "b = Relu n", "c = Mul b 0.3", "y = Sub a c"],
    ],
    "Clip": [["a = Max x 0", "y = Min a 6"], ["a = Relu x", "y = Min a 6"], ["a = Min x 2", "y = Max a -1"]],
    "Relu": [["y = Max x 0"], ["a = Relu x", "y = Abs a"]],
}  # fmt: skip


@pytest.mark.parametrize(("operator", "lines"), [(op, form) for op, forms in FORMS.items() for form in forms])
def test_every_form_becomes_the_operator(operator: str, lines: list[str]) -> None:
    assert fused(lines) == [operator]


@pytest.mark.parametrize("operator", ["Gelu", "HardSwish", "HardSigmoid"])
def test_half_precision(operator: str) -> None:
    assert fused(FORMS[operator][0], dtype=TensorProto.FLOAT16) == [operator]


def test_the_two_forms_of_gelu_are_told_apart() -> None:
    for lines, approximate in ((FORMS["Gelu"][0], b"none"), (FORMS["Gelu"][5], b"tanh")):
        (found,) = apply(build(lines), "fuse")[0].graph.node
        assert onnx.helper.get_node_attr_value(found, "approximate") == approximate


def test_a_constant_factor_stays_behind() -> None:
    assert fused(["a = Add x 3", "b = Clip a 0 6", "y = Mul x b"]) == ["HardSwish", "Mul"]


@pytest.mark.parametrize(
    "lines",
    [
        ["a = Div x 1.4140", "b = Erf a", "c = Add b 1", "d = Mul x c", "y = Mul d 0.5"],
        [f"a = Div x {ROOT2}", "b = Erf a", "c = Add b 1.001", "d = Mul x c", "y = Mul d 0.5"],
        ["p = Pow x 3", "q = Mul p 0.0447", "r = Add x q", f"s = Mul r {ROOT_2_PI}", "t = Tanh s", "u = Add t 1",
         "h = Mul x 0.5", "y = Mul h u"],
        ["a = Add x 3", "b = Clip a 0 6.01", "c = Mul x b", "y = Div c 6"],
        ["a = Add x 3", "b = Relu a", "c = Mul x b", "y = Div c 6"],
        ["a = Exp x", "b = Add a 1.0001", "y = Log b"],
        ["a = Sigmoid x", "y = Mul x a"],
        ["a = Add x 12582912", "b = Sub a 12582912", "y = Relu b"],
        ["a = Sub x x", "b = Relu a", "y = Tanh b"],  # zero, as is any function without a factor
    ],
)  # fmt: skip
def test_what_is_close_to_a_known_function_is_left_alone(lines: list[str]) -> None:
    assert fused(lines) == [line.split(" = ")[1].split()[0] for line in lines]


def test_a_bound_that_only_large_numbers_meet_stays() -> None:
    lines = ["a = Add x 3", "b = Clip a 0 6", "c = Mul x b", "d = Min c 60000", "y = Div d 6"]
    assert fused(lines) == ["HardSwish", "Mul", "Min", "Div"]


def test_the_opset_is_raised_only_as_far_as_needed() -> None:
    for operator, old, new in (("HardSwish", 12, 14), ("Gelu", 17, 20), ("HardSigmoid", 12, 12)):
        model = build(FORMS[operator][0], opset=old)
        result, _ = apply(model, "fuse")
        assert operators(result) == [operator]
        assert result.opset_import[0].version == new
        kept, _ = apply(model, "fuse(opset=0)")
        assert kept.opset_import[0].version == old
        spelled = ["HardSigmoid", "Mul"] if operator == "HardSwish" else operators(model)
        assert operators(kept) == ([operator] if old == new else spelled)
        assert_same(model, kept, {"x": X}, 2e-6)
        again, _ = apply(kept, "simplify,fold,fuse(opset=0)")
        assert operators(again) == operators(kept)


def test_the_opset_is_not_raised_for_what_it_does_not_reach() -> None:
    """HardSwish is spelled out below 14, which needs no version of its own."""
    result, _ = apply(build(FORMS["HardSwish"][0], opset=12), "fuse(opset=13)")
    assert operators(result) == ["HardSigmoid", "Mul"]
    assert result.opset_import[0].version == 12


def test_a_bound_that_is_no_number_stays() -> None:
    weights = {"none": np.float32(np.nan), "six": np.float32(6)}
    model = net([node("Relu", "x", "a"), node("Clip", "a none six")], {"x": (2, 3)}, weights, {"y": (2, 3)})
    assert operators(apply(model, "fuse")[0]) == ["Relu", "Clip"]


def test_values_that_others_read_stay() -> None:
    lines = ["a = Add x 3", "b = Clip a 0 6", "c = Mul x b", "y = Div c 6"]
    model = build(lines)
    model.graph.output.append(onnx.helper.make_tensor_value_info("b", TensorProto.FLOAT, X.shape))
    assert operators(apply(model, "fuse")[0]) == operators(model)
    model = build([*lines, "z = Neg b"])
    model.graph.output.append(onnx.helper.make_tensor_value_info("z", TensorProto.FLOAT, X.shape))
    assert operators(apply(model, "fuse")[0]) == operators(model)


def test_a_constant_is_not_taken_for_a_value_of_its_number() -> None:
    """What was found for a program with a value must not be remembered for one with a constant in its place."""
    assert fused(["a = Max x x", "y = Abs a"]) == ["LeakyRelu"]
    assert fused(["a = Max x -1", "y = Abs a"]) == ["Max", "Abs"]


def test_a_constant_that_adds_axes_stays() -> None:
    weights = {"three": np.full((1, 1, 1, 1), 3, np.float32), "low": np.float32(0), "six": np.float32(6)}
    nodes = [node("Add", "x three", "a"), node("Clip", "a low six", "b"), node("Div", "b six")]
    model = net(nodes, {"x": (2, 3)}, weights, {"y": (1, 1, 2, 3)})
    assert operators(apply(model, "fuse")[0]) == ["Add", "HardSigmoid"]


def test_double_precision_is_left_alone() -> None:
    assert fused(FORMS["HardSwish"][0], dtype=TensorProto.DOUBLE) == ["Add", "Clip", "Mul", "Div"]


@st.composite
def programs(draw: st.DrawFn) -> list[str]:
    """Random arithmetic of a few nodes that often looks like an activation function."""
    values = ["x"]
    lines = []
    constants = ["0", "1", "0.5", "2", "3", "6", "-1", "0.16666667", ROOT_HALF]
    for k in range(draw(st.integers(2, 7))):
        op = draw(
            st.sampled_from(["Add", "Mul", "Sub", "Div", "Max", "Min", "Erf", "Tanh", "Sigmoid", "Relu", "Neg", "Abs"])
        )
        left = draw(st.sampled_from(values[-3:]))
        if op in ("Add", "Mul", "Sub", "Max", "Min"):
            right = draw(st.sampled_from([*constants, *values]))
            lines.append(f"v{k} = {op} {left} {right}")
        elif op == "Div":
            lines.append(f"v{k} = Div {left} {draw(st.sampled_from(['2', '6', ROOT2]))}")
        else:
            lines.append(f"v{k} = {op} {left}")
        values.append(f"v{k}")
    lines[-1] = "y" + lines[-1][len(values[-1]) :]
    return lines


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines=programs())
def test_random_arithmetic_keeps_its_values(lines: list[str]) -> None:
    assert len(fused(lines)) <= len(lines)
