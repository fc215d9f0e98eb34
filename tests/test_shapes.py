"""Propagated shapes and contents against what the operators really give, on the node cases of the onnx package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from node_corpus import cases, is_tensor, loaded, with_constants

from onnxslim import model as model_io
from onnxslim import runtime, symbolic
from onnxslim.graph import set_constant
from onnxslim.shapes import Shapes


def with_names(proto: onnx.ModelProto, arrays: list[Any]) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The model with a name in the place of every size of its inputs, and what the names stand for."""
    copy, sizes = onnx.ModelProto(), {}
    copy.CopyFrom(proto)
    for value, array in zip(copy.graph.input, arrays, strict=True):
        if value.type.HasField("tensor_type") and is_tensor(array):
            for k, dim in enumerate(value.type.tensor_type.shape.dim):
                dim.dim_param = f"{value.name}_{k}"
                sizes[dim.dim_param] = np.asarray(array).shape[k]
    return copy, sizes


def faults(proto: onnx.ModelProto, arrays: list[Any], outputs: list[Any], sizes: dict[str, int]) -> tuple[str, int]:
    """What is said wrongly about the outputs of a case ('' if nothing), and how many contents were known."""
    model = loaded(proto)
    if model is None:
        return "", 0
    shapes = Shapes(model).run()
    known = 0
    for value, output in zip(model.graph.outputs, outputs, strict=False):
        if not is_tensor(output) or value.producer() is None:
            continue
        want, fact = np.asarray(output), shapes.fact(value)
        if fact.shape is None or (want.size == 0 and sizes):
            continue  # sizes of 0 where a name stands: documented as not followed
        got = [symbolic.evaluate(d, sizes) for d in fact.shape]
        if len(got) != want.ndim or any(g is not None and g != w for g, w in zip(got, want.shape, strict=True)):
            return f"{value.name}: shape {fact.shape} = {got}, really {want.shape}", known
        if fact.content is not None:
            known += 1
            numbers = [symbolic.evaluate(d, sizes) for d in fact.content.reshape(-1)]
            if any(n is not None and n != int(w) for n, w in zip(numbers, want.reshape(-1), strict=True)):
                return f"{value.name}: content {numbers}, really {want.tolist()}", known
    return "", known


@pytest.mark.parametrize("symbolic_sizes", [False, True])
def test_every_node_case_has_the_shape_that_was_said(symbolic_sizes: bool) -> None:
    wrong, contents = [], 0
    for index, (name, proto, inputs, outputs) in enumerate(cases()):
        for case, arrays in with_constants(proto, inputs, index):
            if symbolic_sizes:
                case, sizes = with_names(case, arrays)
            else:
                sizes = {}
                if len(arrays) == len(inputs):
                    continue  # what is static says little that the symbolic run does not
            fault, known = faults(case, arrays, outputs, sizes)
            contents += known
            if fault:
                wrong.append(f"{name}: {fault}")
    assert not wrong, "\n".join(wrong)
    assert contents > 15


def known(text: str, value: str) -> tuple[Any, Any]:
    """Shape and content of a value, as text."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    model = model_io.load(proto)
    fact = Shapes(model).run().fact(next(v for n in model.graph for v in n.outputs if v.name == value))
    return fact.shape, fact.content


def test_sizes_stay_polynomials_through_shape_arithmetic() -> None:
    shape, _ = known(
        """(float[batch, sequence, 768] x) => (float[a, b, c, d] y) <int64[1] heads = {12}, int64 zero = {0},
            int64 one = {1}, int64[1] axis = {0}, int64[1] rest = {-1}> {
            s = Shape(x)
            n = Gather(s, zero)
            m = Gather(s, one)
            p = Mul(n, m)
            q = Unsqueeze(p, axis)
            t = Concat<axis=0>(q, heads, rest)
            y0 = Reshape(x, t)
            y = Unsqueeze(y0, axis)
        }""",
        "y0",
    )
    n, m = symbolic.named("batch"), symbolic.named("sequence")
    assert shape == (n * m, 12, 64)


def test_a_size_that_is_not_followed_leaves_the_others_known() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, c, h, w] x) => (float[n, c, p, q] y) <float two = {2}, float[0] none = {}> {
            s = Shape<start = 0, end = 2>(x)
            t = Shape<start = 2, end = 4>(x)
            f = Cast<to = 1>(t)
            half = Div(f, two)
            floor = Floor(half)
            i = Cast<to = 7>(floor)
            sizes = Concat<axis = 0>(s, i)
            y = Resize(x, none, none, sizes)
        }
    """)
    model = model_io.load(proto)
    shapes = Shapes(model)
    for node in model.graph:
        shapes.visit(node)
    n, c, *_ = shapes.shape(model.graph.outputs[0]) or ()
    assert [symbolic.name_of(n), symbolic.name_of(c)] == ["n", "c"]


def test_a_product_of_weights_in_blocks_has_as_many_columns_as_it_says() -> None:
    weights = {"w": np.zeros((48, 3, 16), np.uint8), "s": np.ones(144, np.float32)}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=96, N=48, bits=4,
                               block_size=32)],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, "n", 96])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(a, n) for n, a in weights.items()],
    )  # fmt: skip
    imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = model_io.load(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10))
    shape = Shapes(model).run().fact(model.graph.outputs[0]).shape
    assert shape is not None
    want = runtime.load(model)({"x": np.zeros((2, 5, 96), np.float32)})["y"].shape
    assert tuple(symbolic.evaluate(d, {"n": 5}) for d in shape) == want


def test_declared_shapes_of_intermediate_values_are_not_believed() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[4, 8] x) => (float[n, m] y) <float[2, 2] a> {
            a = Relu(x)
            y = Neg(a)
        }"""
    )
    model = model_io.ir.from_proto(proto)
    shapes = Shapes(model).run()
    assert shapes.shape(model.graph.outputs[0]) == (4, 8)


def test_inputs_of_loop_bodies_have_no_shape() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[n] y) <int64 trips = {3}, bool go = {1}> {
            y = Loop<body = body (int64 i, bool c, float[n] v) => (bool d, float[m] w) {
                d = Identity(c)
                w = Concat<axis=0>(v, v)
            }>(trips, go, x)
        }"""
    )
    model = model_io.load(proto)
    shapes = Shapes(model).run()
    body = next(iter(model.graph.subgraphs()))
    assert shapes.shape(body.inputs[2]) is None
    assert shapes.shape(model.graph.outputs[0]) is None


def test_shapes_found_are_declared_and_correct_what_was_declared_wrongly() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[a, b] y) <float[7, 7] wrong, float[c, 2] half> {
            wrong = Relu(x)
            new = Transpose<perm=[1, 0]>(wrong)
            half = Compress<axis=1>(wrong, m)
            y = MatMul(wrong, new)
        }"""
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([True, False, True, False]), "m"))
    model = model_io.load(proto)
    outputs = [list(v.shape or ()) for v in model.graph.outputs]
    Shapes(model).run().declare()
    declared = {v.name: v.shape for node in model.graph for v in node.outputs}
    assert [str(d) for d in declared["wrong"]] == ["n", "4"]
    assert [str(d) for d in declared["new"]] == ["4", "n"]
    assert [list(v.shape or ()) for v in model.graph.outputs] == outputs
    assert declared["half"][1] == 2  # what inference does not know stays


def test_a_weight_with_new_content_is_known_anew() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[6] x) => (float[2, 3] y) { y = Reshape(x, t) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 3]), "t"))
    model = model_io.load(proto)
    shapes, weight = Shapes(model), model.graph.initializers["t"]
    for content in ([2, 3], [3, 2], [6]):
        set_constant(weight, np.array(content))
        known = shapes.content(weight)
        assert known is not None and known.tolist() == content
        assert shapes.shape(weight) == (len(content),)
