"""Layers in the branches of If nodes on integers: where the data takes the branch, and as right as elsewhere."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim import data, runtime
from onnxslim import model as model_io
from onnxslim.contract import Context, Outcome, Pass
from onnxslim.passes.dynamic_int8 import DynamicInt8
from onnxslim.passes.int4 import Int4
from onnxslim.passes.int8 import Int8
from onnxslim.passes.int8_weights import Int8Weights

CHANNELS = 16


def branch(name: str, nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
    """The body of an If or Loop."""
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])


def conv(source: str, weight: str, output: str) -> onnx.NodeProto:
    """A Conv named like its weight."""
    return helper.make_node("Conv", [source, weight, "bias"], [output], name=weight, pads=[1, 1, 1, 1])


def branched(nested: bool = False) -> onnx.ModelProto:
    """outer Conv - If (two Convs and what is captured, or one Conv) - last Conv; both branches use the same names.

    With ``nested``, the two Convs are in an If of their own, whose other branch has one.
    """
    rng = np.random.default_rng(0)
    names = ("outer", "then1", "then2", "other", "deep", "last")
    shape = (CHANNELS, CHANNELS, 3, 3)
    weights = {n: (rng.standard_normal(shape) / np.sqrt(9 * CHANNELS)).astype(np.float32) for n in names}
    weights["bias"] = rng.standard_normal(CHANNELS).astype(np.float32) * 0.1
    two = [
        conv("r", "then1", "a"),
        helper.make_node("Relu", ["a"], ["b"]),
        conv("b", "then2", "c"),
        helper.make_node("Add", ["c", "r"], ["d"]),
    ]
    then = branch("then", two, "d")
    if nested:
        deeper = branch("deeper", [conv("r", "deep", "d")], "d")
        inner = helper.make_node("If", ["inner"], ["d"], name="choose_inner", then_branch=then, else_branch=deeper)
        then = branch("around", [inner], "d")
    otherwise = branch("else", [conv("r", "other", "a"), helper.make_node("Relu", ["a"], ["b"])], "b")
    nodes = [
        conv("x", "outer", "o"),
        helper.make_node("Relu", ["o"], ["r"]),
        helper.make_node("If", ["ask"], ["chosen"], name="choose", then_branch=then, else_branch=otherwise),
        conv("chosen", "last", "l"),
        helper.make_node("Relu", ["l"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, CHANNELS, 10, 10])]
    inputs += [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("ask", "inner")[: 1 + nested]]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feed(k: int, ask: bool, inner: bool | None = None) -> dict[str, np.ndarray]:
    x = np.random.default_rng(k).standard_normal((2, CHANNELS, 10, 10)).astype(np.float32)
    return {"x": x, "ask": np.array(ask)} | ({} if inner is None else {"inner": np.array(inner)})


def apply(proto: onnx.ModelProto, item: Pass, feeds: list[dict[str, np.ndarray]]) -> tuple[ir.Model, Outcome]:
    model = model_io.load(proto)
    outcome = item.apply(model, Context(data.open_data(feeds, data.input_specs(model)), threads=1))
    onnx.checker.check_model(model_io.to_proto(model), full_check=True)
    return model, outcome


def gap(proto: onnx.ModelProto, model: ir.Model, sample: dict[str, np.ndarray]) -> float:
    """Relative L2 error."""
    one, two = (runtime.load(m)(sample)["y"] for m in (proto.SerializeToString(), model))
    return float(np.linalg.norm(one - two) / np.linalg.norm(one))


def kernels(model: ir.Model) -> list[str]:
    return [n.op_type for n in runtime.optimized(model).graph.all_nodes()]


@pytest.mark.parametrize("target", ["cpu", "openvino"])
def test_both_branches_on_integers(target: str) -> None:
    proto = branched()
    feeds = [feed(k, k % 2 == 0) for k in range(12)]
    model, outcome = apply(proto, Int8(measure=False, target=target), feeds)  # type: ignore[arg-type]
    assert outcome.stats["int8_layers"] == outcome.stats["layers"] == 5
    assert not outcome.skipped
    for ask in (True, False):
        assert 0 < gap(proto, model, feed(99, ask)) < 0.05
    if target == "cpu":
        assert kernels(model).count("QLinearConv") == 5
        assert not {"Conv", "Add", "Relu"} & set(kernels(model))
        assert outcome.stats["integer_macs_fraction"] == 1
    assert model_io.weight_bytes(model) < 0.4 * sum(len(t.raw_data) for t in proto.graph.initializer)


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_that_no_sample_takes_stays_in_float_and_is_named(taken: bool) -> None:
    proto = branched()
    model, outcome = apply(proto, Int8(measure=False, keep=("outer", "last")), [feed(k, taken) for k in range(8)])
    inside, outside = ({"then1", "then2"}, {"other"}) if taken else ({"other"}, {"then1", "then2"})
    assert {s.node for s in outcome.skipped if "no sample takes the branch" in s.reason} == outside
    assert outcome.stats["int8_layers"] == len(inside)
    assert kernels(model).count("QLinearConv") == len(inside)
    assert 0 < gap(proto, model, feed(99, taken)) < 0.05
    assert gap(proto, model, feed(99, not taken)) < 1e-6


@pytest.mark.parametrize(("ask", "inner"), [(True, True), (True, False), (False, True)])
def test_a_branch_in_a_branch(ask: bool, inner: bool) -> None:
    proto = branched(nested=True)
    feeds = [feed(k, bool(k & 1), bool(k & 2)) for k in range(16)]
    model, outcome = apply(proto, Int8(measure=False), feeds)
    assert outcome.stats["int8_layers"] == outcome.stats["layers"] == 6
    assert kernels(model).count("QLinearConv") == 6
    assert 0 < gap(proto, model, feed(99, ask, inner)) < 0.05


def test_an_inlined_branch_gives_the_same_integers() -> None:
    """What a branch computes on integers is what its layers compute in the main graph."""
    proto = branched()
    feeds = [feed(k, True) for k in range(8)]
    inside, _ = apply(proto, Int8(measure=False, equalize=False), feeds)
    flat = onnx.ModelProto.FromString(proto.SerializeToString())
    chosen = next(n for n in flat.graph.node if n.op_type == "If")
    at = list(flat.graph.node).index(chosen)
    body = next(a.g for a in chosen.attribute if a.name == "then_branch")
    nodes = [*flat.graph.node[:at], *body.node, *flat.graph.node[at + 1 :]]
    del flat.graph.node[:]
    flat.graph.node.extend(nodes)
    next(n for n in flat.graph.node if n.name == "last").input[0] = "d"
    outside, _ = apply(flat, Int8(measure=False, equalize=False), feeds)
    for k in range(3):
        one, two = (runtime.load(m)(feed(50 + k, True))["y"] for m in (inside, outside))
        assert np.linalg.norm(one - two) < 0.02 * np.linalg.norm(one)


def products(loop: bool = False) -> onnx.ModelProto:
    """A MatMul in each branch of an If, or one in the body of a Loop that runs it three times."""
    rng = np.random.default_rng(1)
    weights = {n: (rng.standard_normal((96, 96)) / 10).astype(np.float32) for n in ("u", "v")}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 96])]
    if loop:
        body = helper.make_graph(
            [
                helper.make_node("MatMul", ["state", "u"], ["m"], name="u"),
                helper.make_node("Tanh", ["m"], ["next"]),
                helper.make_node("Identity", ["going"], ["on"]),
            ],
            "body",
            [
                helper.make_tensor_value_info("step", TensorProto.INT64, []),
                helper.make_tensor_value_info("going", TensorProto.BOOL, []),
                helper.make_tensor_value_info("state", TensorProto.FLOAT, [4, 96]),
            ],
            [
                helper.make_tensor_value_info("on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("next", TensorProto.FLOAT, [4, 96]),
            ],
        )
        nodes = [helper.make_node("Loop", ["three", "", "x"], ["y"], name="loop", body=body)]
        weights["three"] = np.array(3)
        weights.pop("v")
    else:
        inputs.append(helper.make_tensor_value_info("ask", TensorProto.BOOL, []))
        parts = {
            f"{kind}_branch": branch(kind, [helper.make_node("MatMul", ["x", w], ["m"], name=w)], "m")
            for kind, w in (("then", "u"), ("else", "v"))
        }
        nodes = [helper.make_node("If", ["ask"], ["y"], name="choose", **parts)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 96])]
    constants = [numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("loop", [True, False])
@pytest.mark.parametrize("item", [Int4(), Int8Weights(), DynamicInt8(measure=False)])
def test_weights_in_bodies(item: Pass, loop: bool) -> None:
    proto = products(loop)
    rng = np.random.default_rng(2)

    def sample(ask: bool) -> dict[str, np.ndarray]:
        x = rng.standard_normal((4, 96)).astype(np.float32)
        return {"x": x} | ({} if loop else {"ask": np.array(ask)})

    model, _ = apply(proto, item, [sample(k % 2 == 0) for k in range(8)])
    found = kernels(model)
    kernel = "DynamicQuantizeMatMul" if isinstance(item, DynamicInt8) else "MatMulNBits"
    assert found.count(kernel) == (1 if loop else 2)
    assert "MatMul" not in found
    for ask in (True, False):
        assert 0 < gap(proto, model, sample(ask)) < (0.2 if isinstance(item, Int4) else 0.03)
