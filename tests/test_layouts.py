"""Transposes pushed through operators: the same bits, fewer nodes."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.data import Data
from onnxslim.graph import count_nodes
from onnxslim.layouts import remove_changes
from onnxslim.liveness import remove_unread
from onnxslim.passes.simplify import Simplify
from onnxslim.shapes import Shapes


def build(text: str, *weights: tuple[str, np.ndarray]) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights)
    return proto


def run(proto: onnx.ModelProto, seed: int = 0) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options)
    rng = np.random.default_rng(seed)
    feeds = {
        i.name: rng.normal(size=[d if isinstance(d, int) else 2 for d in i.shape]).astype(np.float32)
        for i in session.get_inputs()
    }
    return session.run(None, feeds)


def simplified(proto: onnx.ModelProto) -> onnx.ModelProto:
    model = model_io.load(proto)
    Simplify().apply(model, Context(Data("none", 0, lambda k: {}, []), synthetic=True))
    return model_io.to_proto(model)


def operators(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node]


def test_transposes_around_a_chain_cancel() -> None:
    proto = build(
        """(float[n, 4, 5, 6] x) => (float[n, 4, 5, 6] y) {
            a = Transpose<perm=[0, 2, 3, 1]>(x)
            b = Mul(a, w)
            c = Sigmoid(b)
            d = ReduceMax<axes=[1, 2], keepdims=1>(c)
            e = Sub(c, d)
            y = Transpose<perm=[0, 3, 1, 2]>(e)
        }""",
        ("w", np.arange(4, dtype=np.float32)),
    )
    result = simplified(proto)
    assert operators(result) == ["Mul", "Sigmoid", "ReduceMax", "Sub"]
    np.testing.assert_array_equal(run(proto)[0], run(result)[0])


def test_two_operands_share_the_transpose_after_them() -> None:
    proto = build(
        """(float[2, 3, 4] x, float[2, 3, 4] z) => (float[4, 3, 2] y) {
            a = Transpose<perm=[2, 1, 0]>(x)
            b = Transpose<perm=[2, 1, 0]>(z)
            y = Add(a, b)
        }"""
    )
    result = simplified(proto)
    assert sorted(operators(result)) == ["Add", "Transpose"]
    np.testing.assert_array_equal(run(proto)[0], run(result)[0])


def test_reshapes_around_elementwise_operators_cancel() -> None:
    proto = build(
        """(float[batch, sequence, 8] x) => (float[batch, sequence, 8] y) {
            a = Reshape(x, flat)
            b = Relu(a)
            c = Mul(b, half)
            d = Shape(x)
            y = Reshape(c, d)
        }""",
        ("flat", np.array([-1, 8])),
        ("half", np.array([[0.5]], np.float32)),
    )
    result = simplified(proto)
    assert operators(result) == ["Relu", "Mul"]
    np.testing.assert_array_equal(run(proto)[0], run(result)[0])


def test_two_readers_share_the_change_before_them() -> None:
    proto = build(
        """(float[n, 4] x) => (float[n, 1, 4] y) {
            a = Cos(x)
            b = Unsqueeze(a, axis)
            c = Sin(x)
            d = Unsqueeze(c, axis)
            y = Sub(b, d)
        }""",
        ("axis", np.array([1])),
    )
    result = simplified(proto)
    assert sorted(operators(result)) == ["Cos", "Sin", "Sub", "Unsqueeze"]
    np.testing.assert_array_equal(run(proto)[0], run(result)[0])


@pytest.mark.parametrize(
    "ends", ["y = Transpose<perm=[1, 0]>(e)", "y = Neg(e)", "f = Transpose<perm=[1, 0]>(e) y = Sub(f, b)"]
)
def test_a_tensor_meets_its_own_transpose(ends: str) -> None:
    proto = build(
        "(float[3, 3] x, float[3, 3] z) => (float[3, 3] y) {"
        "a = Transpose<perm=[1, 0]>(x) k = Transpose<perm=[1, 0]>(z) b = Sub(a, k) c = Transpose<perm=[1, 0]>(b)"
        "d = Sub(c, a) e = Sub(d, b)" + ends + "}"
    )
    result = simplified(proto)
    assert len(operators(result)) <= len(operators(proto))
    np.testing.assert_array_equal(run(proto)[0], run(result)[0])


def test_parts_of_one_tensor_are_turned_before_it_is_split() -> None:
    proto = build(
        """(float[2, 5, 12, 8] x) => (float[2, 4, 5, 8] y) {
            q, k, v = Split<axis=2>(x, sizes)
            a = Transpose<perm=[0, 2, 1, 3]>(q)
            b = Transpose<perm=[0, 2, 3, 1]>(k)
            c = Transpose<perm=[0, 2, 1, 3]>(v)
            d = MatMul(a, b)
            y = MatMul(d, c)
        }""",
        ("sizes", np.array([4, 4, 4])),
    )
    result = simplified(proto)
    # The Transpose of the keys goes in front of the Split as well, but for the part that only they need.
    assert operators(result) == ["Transpose", "Split", "Transpose", "MatMul", "MatMul"]
    for want, got in zip(run(proto), run(result), strict=True):
        np.testing.assert_array_equal(want, got)


def test_parts_that_are_turned_and_read_as_they_are_stay_apart() -> None:
    proto = build(
        """(float[2, 5, 8, 8] x) => (float[2, 4, 5, 8] y, float[2, 5, 4, 8] z) {
            q, k = Split<axis=2>(x, sizes)
            y = Transpose<perm=[0, 2, 1, 3]>(q)
            z = Sigmoid(k)
        }""",
        ("sizes", np.array([4, 4])),
    )
    assert sorted(operators(simplified(proto))) == ["Sigmoid", "Split", "Transpose"]


def test_a_single_transpose_stays_where_it_is() -> None:
    proto = build("(float[2, 3] x) => (float[3, 2] y) { a = Transpose<perm=[1, 0]>(x)\n y = Relu(a) }")
    assert operators(simplified(proto)) == ["Transpose", "Relu"]


def random_graph(seed: int) -> onnx.ModelProto:
    """Transposes, elementwise operators and operators with axes over tensors of one permuted shape."""
    rng = np.random.default_rng(seed)
    # With equal sizes a tensor and its transpose can meet in one operator.
    first = (2, 3, 4, 5) if seed % 2 else (2, 3, 3, 3)
    values: list[tuple[str, tuple[int, ...]]] = [(f"x{k}", first) for k in range(2)]
    nodes, weights = [], []
    for k in range(int(rng.integers(6, 22))):
        name, (source, shape) = f"v{k}", values[int(rng.integers(max(0, len(values) - 5), len(values)))]
        partners = [n for n, s in values if s == shape]
        kind = rng.choice(
            ["t", "t", "t", "unary", "binary", "weight", "softmax", "view", "view", "reduce", "concat", "pad", "slice"]
        )
        if kind == "t":
            perm = [[0, 2, 3, 1], [0, 3, 1, 2], [0, 2, 1, 3]][int(rng.integers(3))]
            nodes.append(helper.make_node("Transpose", [source], [name], perm=perm))
            shape = tuple(shape[p] for p in perm)
        elif kind == "view":
            weights.append(numpy_helper.from_array(np.array([-1, shape[3]]), f"f{k}"))
            weights.append(numpy_helper.from_array(np.array([-1, *shape[1:]]), f"g{k}"))
            nodes.append(helper.make_node("Reshape", [source, f"f{k}"], [f"{name}_f"]))
            nodes.append(helper.make_node("Neg", [f"{name}_f"], [f"{name}_n"]))
            nodes.append(helper.make_node("Reshape", [f"{name}_n", f"g{k}"], [name]))
        elif kind == "unary":
            nodes.append(helper.make_node(str(rng.choice(["Relu", "Sigmoid", "Neg"])), [source], [name]))
        elif kind == "binary":
            other = partners[int(rng.integers(len(partners)))]
            nodes.append(helper.make_node(str(rng.choice(["Add", "Mul", "Sub"])), [source, other], [name]))
        elif kind == "weight":
            rank = int(rng.integers(0, 5))
            array = rng.normal(size=shape[4 - rank :]).astype(np.float32)
            weights.append(numpy_helper.from_array(array, f"w{k}"))
            nodes.append(helper.make_node("Mul", [f"w{k}", source], [name]))
        elif kind == "softmax":
            nodes.append(helper.make_node("Softmax", [source], [name], axis=int(rng.integers(-4, 4))))
        elif kind == "reduce":
            axis = int(rng.integers(-4, 4))
            nodes.append(helper.make_node("ReduceMax", [source], [f"{name}_m"], axes=[axis], keepdims=1))
            nodes.append(helper.make_node("Sub", [source, f"{name}_m"], [name]))
        elif kind == "concat":
            axis = int(rng.integers(-4, 4))
            nodes.append(helper.make_node("Concat", [source, source], [f"{name}_c"], axis=axis))
            weights += [
                numpy_helper.from_array(np.array([v]), f"{n}{k}")
                for n, v in zip("sea", (1, 1 + shape[axis], axis), strict=True)
            ]
            nodes.append(helper.make_node("Slice", [f"{name}_c", f"s{k}", f"e{k}", f"a{k}"], [name]))
        else:
            pads = rng.integers(0, 2, 8)
            ends = [p + s for p, s in zip(pads[:4], shape, strict=True)]
            weights.append(numpy_helper.from_array(pads, f"p{k}"))
            weights += [numpy_helper.from_array(np.array(v), f"{n}{k}") for n, v in (("s", pads[:4]), ("e", ends))]
            nodes.append(helper.make_node("Pad", [source, f"p{k}"], [f"{name}_p"]))
            nodes.append(helper.make_node("Slice", [f"{name}_p", f"s{k}", f"e{k}"], [name]))
        values.append((name, shape))
    chosen = dict.fromkeys([values[-1], *(values[int(rng.integers(2, len(values)))] for _ in range(2))])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", *s[1:]]) for n, s in values[:2]],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * 4) for n, _ in chosen],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("block", range(4))
def test_random_graphs_keep_their_bits_and_lose_nodes(block: int) -> None:
    total_saved = 0
    for seed in range(block * 40, block * 40 + 40):
        proto = random_graph(seed)
        model = model_io.load(proto)
        before = count_nodes(model)
        shapes = Shapes(model).run()
        saved = remove_changes(model, shapes)
        remove_unread(model)
        again = Shapes(model).run()
        assert all(shapes.shape(v) == again.shape(v) for node in model.graph for v in node.outputs), f"seed {seed}"
        alone = model_io.to_proto(model)
        result = simplified(proto)
        assert count_nodes(model) <= before - saved or saved == 0, f"seed {seed}"
        assert len(result.graph.node) <= before, f"seed {seed}"
        onnx.checker.check_model(result, full_check=True)
        for name, other in (("alone", alone), ("simplified", result)):
            for a, b in zip(run(proto, seed), run(other, seed), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"seed {seed} {name}")
        total_saved += saved
    assert total_saved > 2
