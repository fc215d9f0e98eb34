"""Factors move back to weights, and only where everything that changes is scaled once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

sys.path.insert(0, str(Path(__file__).parents[2]))
from nets import fold, net, node, normal
from oracles import apply, assert_same, operators

B, S, H, D = 2, 5, 2, 4
X = normal(B, S, H * D)


def weights() -> dict[str, np.ndarray]:
    return {
        "wq": normal(H * D, H * D), "bq": normal(H * D), "wk": normal(H * D, H * D), "bk": normal(H * D),
        "heads": np.array([0, S, H, D]), "scale": np.float32(0.35), "cos": normal(S, D), "sin": normal(S, D),
        "halves": np.array([D // 2, D // 2]), "gamma": normal(D), "row": normal(D), "beta": normal(D),
        "turn": normal(D, D),
    }  # fmt: skip


def projected(prefix: str) -> list[onnx.NodeProto]:
    """x through a linear layer, split into heads: (batch, heads, length, size)."""
    return [
        node("MatMul", f"x w{prefix}", f"{prefix}0"),
        node("Add", f"{prefix}0 b{prefix}", f"{prefix}1"),
        node("Reshape", f"{prefix}1 heads", f"{prefix}2"),
        node("Transpose", f"{prefix}2", prefix, perm=[0, 2, 1, 3]),
    ]


def attention(*middle: onnx.NodeProto, left: str = "q", outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    """Scores of queries against keys; ``middle`` lies between the query and the product."""
    nodes = [
        *projected("q"),
        *projected("k"),
        node("Transpose", "k", "kt", perm=[0, 1, 3, 2]),
        *middle,
        node("MatMul", f"{left} kt"),
    ]
    return net(nodes, {"x": X.shape}, weights(), outputs)


def rotary() -> list[onnx.NodeProto]:
    return [
        node("Mul", "q cos", "qc"),
        node("Split", "q halves", "q_first q_second", axis=3),
        node("Neg", "q_second", "q_negative"),
        node("Concat", "q_negative q_first", "q_turned", axis=3),
        node("Mul", "q_turned sin", "qs"),
        node("Add", "qc qs", "r"),
    ]


@pytest.mark.parametrize("op", ["Mul", "Div"])
def test_the_factor_of_queries(op: str) -> None:
    model = attention(node(op, "q scale", "p"), left="p")
    result = fold(model, {"x": X})
    assert len(operators(result)) == len(operators(apply(model, "simplify")[0])) - 1


def test_factors_of_queries_and_keys() -> None:
    model = attention(node("Mul", "q scale", "p"), left="p")
    model.graph.node.insert(-1, node("Mul", "scale kt", "kts"))
    model.graph.node[-1].input[1] = "kts"
    result = fold(model, {"x": X})
    assert "Mul" not in operators(result)


def test_a_factor_of_the_scores() -> None:
    model = attention()
    model.graph.node[-1].CopyFrom(node("MatMul", "q kt", "scores"))
    model.graph.node.append(node("Div", "scores scale"))
    assert "Div" not in operators(fold(model, {"x": X}))


def test_through_rotary_embeddings() -> None:
    model = attention(*rotary(), node("Mul", "r scale", "p"), left="p")
    result = fold(model, {"x": X})
    assert operators(result).count("Mul") == 2


def test_through_a_quotient() -> None:
    model = attention(node("Exp", "row", "e"), node("Div", "q e", "d"), node("Mul", "d scale", "p"), left="p")
    model.graph.input.append(onnx.helper.make_tensor_value_info("row", TensorProto.FLOAT, [D]))
    rest = [t for t in model.graph.initializer if t.name != "row"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)
    assert "Mul" not in operators(fold(model, {"x": X, "row": normal(D)}))


def test_into_the_scale_of_a_normalization() -> None:
    model = attention(
        node("LayerNormalization", "q gamma beta", "n", axis=-1),
        node("Transpose", "n", "t", perm=[0, 1, 2, 3]),
        node("Mul", "t scale", "p"),
        left="p",
    )
    assert "Mul" not in operators(fold(model, {"x": X}))


KEPT = {
    "the weight is read through something that is not homogeneous": attention(
        node("Relu", "q", "a"), node("Add", "a row", "b"), node("Exp", "b", "e"), node("Mul", "e scale", "p"), left="p"
    ),
    "somebody else reads the query": attention(
        node("Mul", "q scale", "p"), node("Identity", "q", "z"), left="p", outputs=("y", "z")
    ),
    "the query is an output": attention(node("Mul", "q scale", "p"), left="p", outputs=("y", "q")),
    "the factor is zero": attention(node("Mul", "q zero", "p"), left="p"),
    "the factor varies": attention(node("Mul", "q row", "p"), left="p"),
    "the factor adds an axis": attention(node("Mul", "q wide", "p"), left="p"),
    "the query is multiplied with itself": attention(
        node("Mul", "q q", "qq"), node("Mul", "qq scale", "p"), left="p"
    ),
    "the query is multiplied with what comes from it": attention(
        node("Sigmoid", "q", "g"), node("Mul", "q g", "qg"), node("Mul", "qg scale", "p"), left="p"
    ),
    "both factors of a product would be scaled": attention(
        node("Neg", "q", "n"), node("Mul", "q n", "qn"), node("Concat", "qn n", "s", axis=2),
        node("Mul", "s scale", "p"), left="p",
    ),
    "both operands of a quotient would be scaled": attention(
        node("Neg", "q", "n"), node("Div", "q n", "qn"), node("Concat", "qn n", "s", axis=2),
        node("Mul", "s scale", "p"), left="p",
    ),
    "a linear layer would be scaled along with its data": attention(
        node("MatMul", "q turn", "l"), node("Concat", "q l", "s", axis=2), node("Mul", "s scale", "p"), left="p"
    ),
    "one term of the sum cannot be scaled": attention(
        node("Exp", "q", "e"), node("Add", "e q", "s"), node("Mul", "s scale", "p"), left="p"
    ),
    "only a part is scaled": attention(
        node("Split", "q halves", "first second", axis=3), node("Mul", "first scale", "p"),
        node("Concat", "p second", "j", axis=3), left="j",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", KEPT)
def test_what_would_not_be_exact_stays(why: str) -> None:
    model = KEPT[why]
    for name, array in {"zero": np.float32(0), "wide": np.full([1] * 5, 3, np.float32)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    result = fold(model, {"x": X})
    assert operators(result) == operators(model)


def test_a_weight_that_others_share_is_not_copied() -> None:
    model = attention(node("Mul", "q scale", "p"), left="p")
    model.graph.node[4].input[1] = "wq"
    result = fold(model, {"x": X})
    assert "Mul" in operators(result)


def test_half_precision_keeps_factors_above_one() -> None:
    """The scaled query would leave its range before the keys bring it back."""
    for factor, kept in ((3.0, True), (0.3, False)):
        parts = {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in weights().items()}
        parts["scale"] = np.float16(factor)
        base = attention(node("Mul", "q scale", "p"), left="p")
        model = net(list(base.graph.node), {"x": X.shape}, parts, ["y"], dtype=TensorProto.FLOAT16)
        assert ("Mul" in operators(apply(model, "fold")[0])) is kept


@pytest.mark.parametrize(("size", "kept"), [(1e-2, False), (1e-3, True)])
def test_constants_that_would_become_subnormal_stay(size: float, kept: bool) -> None:
    """The constant and the factor are normal numbers of float16; their product has few digits left."""
    nodes = [
        node("Relu", "x", "r"), node("Mul", "r c", "m"), node("Transpose", "m", "t", perm=[1, 0]),
        node("Mul", "t f"),
    ]  # fmt: skip
    parts = {"c": (size * (1 + np.arange(4) / 4)).astype(np.float16), "f": np.float16(1e-2)}
    model = net(nodes, {"x": [3, 4]}, parts, dtype=TensorProto.FLOAT16)
    result, _ = apply(model, "fold")
    assert (operators(result).count("Mul") == 2) is kept
    assert_same(model, result, {"x": np.full((3, 4), 1000, np.float16)}, rtol=3e-3)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_paths(data: st.DataObject) -> None:
    """Whatever lies between a linear layer and a factor, the values stay."""
    nodes = projected("q")
    values = ["q"]
    for k in range(data.draw(st.integers(1, 6))):
        op = data.draw(st.sampled_from(["Neg", "Add", "Mul", "Sub", "Transpose", "row", "Relu", "scale", "MatMul"]))
        name, left = f"v{k}", data.draw(st.sampled_from(values[-2:]))
        if op in ("Add", "Mul", "Sub"):
            nodes.append(node(op, f"{left} {data.draw(st.sampled_from(values))}", name))
        elif op in ("row", "scale"):
            nodes.append(
                node(
                    data.draw(st.sampled_from(["Mul", "Add"] if op == "row" else ["Mul", "Div"])), f"{left} {op}", name
                )
            )
        elif op == "Transpose":
            nodes.append(node("Transpose", left, f"{name}_t", perm=[0, 1, 3, 2]))
            nodes.append(node("Transpose", f"{name}_t", name, perm=[0, 1, 3, 2]))
        elif op == "MatMul":
            nodes.append(node("Transpose", left, f"{name}_t", perm=[0, 1, 3, 2]))
            nodes.append(node("MatMul", f"{data.draw(st.sampled_from(values))} {name}_t", f"{name}_s"))
            nodes.append(node("MatMul", f"{name}_s {left}", name))
        else:
            nodes.append(node(op, left, name))
        values.append(name)
    nodes.append(node("Mul", f"{values[-1]} scale"))
    shown = data.draw(st.sets(st.sampled_from(values), max_size=1))
    fold(net(nodes, {"x": X.shape}, weights(), ["y", *shown]), {"x": X})


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_bias_of_a_gemm_is_scaled_once(beta: float) -> None:
    x, arrays = normal(2, 4), {"w": normal(4, 6), "b": normal(6), "scale": np.float32(3)}
    nodes = [node("Gemm", "x w b", "a", beta=beta), node("Transpose", "a", "t"), node("Mul", "t scale")]
    result = fold(net(nodes, {"x": x.shape}, arrays), {"x": x})
    assert sorted(operators(result)) == ["Gemm", "Transpose"]
