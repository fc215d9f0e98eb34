"""The verbs on graphs: names, constants, replacing and dead code, also around subgraphs and graph outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim import graph as g
from onnxslim import model as model_io
from onnxslim import runtime

HEAD = '<ir_version: 8, opset_import: ["" : 17]>'
X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def _load(text: str) -> ir.Model:
    return model_io.load(onnx.parser.parse_model(HEAD + text))


def _run(model: ir.Model, **feeds: np.ndarray) -> dict[str, Any]:
    content = model_io.to_bytes(model)
    onnx.checker.check_model(onnx.ModelProto.FromString(content))
    return runtime.load(content)({"x": X, **feeds})


@pytest.fixture
def diamond() -> ir.Model:
    return _load("""g (float[3, 4] x) => (float[3, 4] y, float[3, 4] z) <float[4] w = {1, 2, 3, 4}> {
        a = Add(x, w)
        b = Relu(a)
        y = Mul(a, b)
        z = Neg(b)
    }""")


def _value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def test_constants_and_their_absence(diamond: ir.Model) -> None:
    weight = diamond.graph.initializers["w"]
    assert np.array_equal(g.constant(weight), [1, 2, 3, 4])
    assert g.is_constant(weight)
    for other in (None, diamond.graph.inputs[0], _value(diamond, "a")):
        assert g.constant(other) is None
        assert not g.is_constant(other)


@pytest.mark.parametrize("array", [np.float32(2.5), np.ones((2, 4), np.float32), np.arange(8.0, dtype=np.float32)[::2]])
def test_set_constant_changes_type_and_shape(diamond: ir.Model, array: Any) -> None:
    array = np.asarray(array)
    weight = diamond.graph.initializers["w"]
    g.set_constant(weight, array)
    assert weight.shape == ir.Shape(array.shape)
    assert np.array_equal(g.constant(weight), array)
    g.set_constant(weight, np.array([1, 2, 3, 4], np.int64))
    assert weight.dtype == ir.DataType.INT64


def test_names_are_new_everywhere(diamond: ir.Model) -> None:
    names = [g.fresh_name(diamond.graph, hint) for hint in ("x", "w", "a", "y", "new", "new")]
    assert len(set(names)) == 6
    assert not set(names) & {"x", "w", "a", "b", "y", "z"}
    assert names[4:] == ["new", "new_1"]


def test_names_inside_bodies_are_taken() -> None:
    model = _load("""g (float[3, 4] x, bool c) => (float[3, 4] y) {
        y = If (c) <then_branch = t () => (inner) { inner = Relu(x) }, else_branch = e () => (other) { other = Neg(x) }>
    }""")
    assert g.fresh_name(model.graph, "inner") != "inner"


def test_added_nodes_and_constants_work(diamond: ir.Model) -> None:
    wanted = _run(diamond)
    node = _value(diamond, "b").producer()
    assert node is not None
    two = g.add_constant(diamond.graph, "w", np.float32(2))
    double = g.add_node(diamond.graph, "Mul", [_value(diamond, "b"), two], after=node, like=_value(diamond, "b"))
    g.replace(_value(diamond, "z"), g.add_node(diamond.graph, "Neg", [double.outputs[0]]).outputs[0])
    g.remove_dead(diamond.graph)
    got = _run(diamond)
    assert np.allclose(got["z"], 2 * wanted["z"])
    assert np.allclose(got["y"], wanted["y"])
    assert double.outputs[0].shape == ir.Shape([3, 4])


def test_replace_moves_every_user(diamond: ir.Model) -> None:
    wanted = _run(diamond)
    g.replace(_value(diamond, "b"), _value(diamond, "a"))
    assert g.remove_dead(diamond.graph) == 1
    got = _run(diamond)
    sums = X + np.array([1, 2, 3, 4], np.float32)
    assert np.allclose(got["y"], sums**2)
    assert np.allclose(got["z"], -sums)
    assert list(got) == list(wanted)


@pytest.mark.parametrize("new", ["a", "x", "w", "z"])
def test_a_replaced_output_keeps_its_name(diamond: ir.Model, new: str) -> None:
    wanted = _run(diamond)
    sources = {"x": diamond.graph.inputs[0], "w": diamond.graph.initializers["w"]}
    source = sources.get(new) or _value(diamond, new)
    g.replace(_value(diamond, "y"), source)
    g.remove_dead(diamond.graph)
    got = _run(diamond)
    assert list(got) == ["y", "z"]
    values = {"a": X + np.arange(1, 5), "x": X, "w": np.array([1, 2, 3, 4]), "z": wanted["z"]}
    assert np.allclose(got["y"], values[new])
    assert np.allclose(got["z"], wanted["z"])


def test_replace_reaches_into_bodies() -> None:
    model = _load("""g (float[3, 4] x, bool c) => (float[3, 4] y) {
        a = Relu(x)
        b = Identity(a)
        y = If (c) <then_branch = t () => (p) { p = Neg(b) }, else_branch = e () => (q) { q = Abs(b) }>
    }""")
    g.replace(_value(model, "b"), _value(model, "a"))
    assert g.remove_dead(model.graph) == 1
    for c in (True, False):
        want = np.maximum(X, 0) * (-1 if c else 1)
        assert np.array_equal(_run(model, c=np.array(c))["y"], want)


def test_dead_code_goes_with_its_weights_and_bodies() -> None:
    model = _load(
        """g (float[3, 4] x, bool c) => (float[3, 4] y)
        <float[4] w = {1, 2, 3, 4}, float[4] lonely = {1, 2, 3, 4}, float[4] used = {1, 1, 1, 1}> {
        a = Add(x, w)
        unused, b = Split<axis = 0, num_outputs = 2>(a)
        d = If (c) <then_branch = t () => (p) { p = Neg(a) }, else_branch = e () => (q) { q = Abs(a) }>
        f = Relu(d)
        y = Add(x, used)
    }""".replace(", num_outputs = 2", "")
    )
    assert g.remove_dead(model.graph) == 4
    assert [node.op_type for node in model.graph] == ["Add"]
    assert list(model.graph.initializers) == ["used"]
    assert np.array_equal(_run(model, c=np.array(True))["y"], X + 1)


def test_dead_code_in_a_body_goes_with_its_weights() -> None:
    model = _load("""g (float[3, 4] x, bool c) => (float[3, 4] y) <float[4] w = {1, 2, 3, 4}> {
        a = Relu(x)
        y = If (c) <then_branch = t () => (p) { u = Add(a, w) v = Abs(u) p = Neg(x) }, else_branch = e () => (q) {
            q = If (c) <then_branch = f () => (r) { r = Abs(x) s = Neg(x) }, else_branch = h () => (o) { o = Relu(x) }>
        }>
    }""")
    assert g.remove_dead(model.graph) == 4
    assert sorted(node.op_type for node in model.graph.all_nodes()) == ["Abs", "If", "If", "Neg", "Relu"]
    assert not model.graph.initializers
    assert np.array_equal(_run(model, c=np.array(True))["y"], -X)


def test_what_a_body_reads_is_alive() -> None:
    model = _load("""g (float[3, 4] x, bool c) => (float[3, 4] y) <float[4] w = {1, 2, 3, 4}> {
        a = Relu(x)
        y = If (c) <then_branch = t () => (p) { p = Add(a, w) }, else_branch = e () => (q) { q = Abs(a) }>
    }""")
    assert g.remove_dead(model.graph) == 0
    assert list(model.graph.initializers) == ["w"]


def test_only_user(diamond: ir.Model) -> None:
    assert g.only_user(_value(diamond, "a")) is None
    assert g.only_user(_value(diamond, "y")) is None
    assert g.only_user(diamond.graph.inputs[0]) is _value(diamond, "a").producer()


def test_attributes() -> None:
    model = _load("g (float[3, 4] x) => (float[6, 2] y) { a = Transpose<perm = [1, 0]>(x) y = Elu<alpha = 0.5>(a) }")
    transpose, elu = model.graph
    assert g.attribute(transpose, "perm") == [1, 0]
    assert g.attribute(elu, "alpha", 1.0) == 0.5
    assert g.attribute(elu, "missing", 7) == 7
    g.set_attribute(elu, "alpha", 2.0)
    assert g.attribute(elu, "alpha") == 2.0
    assert g.is_op(elu, "Relu", "Elu")
    assert not g.is_op(None, "Elu")
    elu.domain = "own"
    assert not g.is_op(elu, "Elu")


def test_shapes_opset_and_node_count() -> None:
    model = _load("""g (float[n, 4] x, bool c) => (float[n, 4] y) {
        y = If (c) <then_branch = t () => (p) { p = Neg(x) }, else_branch = e () => (q) { q = Abs(x) }>
    }""")
    assert g.known_shape(model.graph.inputs[0]) == (None, 4)
    assert g.known_shape(None) is None
    assert g.opset(model) == 17
    assert g.count_nodes(model) == 3


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_dead_code_removal_keeps_the_outputs_of_any_graph(data: st.DataObject) -> None:
    """A random DAG: what is left computes the same outputs, and nothing is left that no output needs."""
    count = data.draw(st.integers(1, 12))
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3, 4]))
    values, nodes, inputs = [value], [], {}
    for k in range(count):
        chosen = [data.draw(st.sampled_from(values)) for _ in range(2)]
        node = ir.node("Add" if data.draw(st.booleans()) else "Sub", chosen, name=f"n{k}")
        node.outputs[0].name, node.outputs[0].type = f"v{k}", value.type
        inputs[node.outputs[0]] = chosen
        nodes.append(node)
        values.append(node.outputs[0])
    outputs = data.draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True))
    model = ir.Model(ir.Graph([value], outputs, nodes=nodes, opset_imports={"": 17}, name="g"), ir_version=8)
    for output in outputs:
        output.shape = ir.Shape([3, 4])
    needed, stack = set(), list(outputs)
    while stack:
        item = stack.pop()
        if item not in needed:
            needed.add(item)
            stack.extend(inputs.get(item, ()))
    wanted = _run(model)
    removed = g.remove_dead(model.graph)
    assert {v for node in model.graph for v in node.outputs} == needed - {value}
    assert removed == count - len(needed - {value})
    got = _run(model)
    assert all(np.array_equal(got[name], wanted[name], equal_nan=True) for name in wanted)
