"""Values and channels in the branches of If: seen where the branch is taken, removed where that is sound."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxslim import coupling, runtime
from onnxslim import data as data_io
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.passes.prune import Prune

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from graph_builder import Builder

from bench.oracle import TOLERANCE, difference, some_units


def _graph(name: str, builder: Builder, output: str) -> onnx.GraphProto:
    """What ``builder`` has collected as the body of a node; its weights stay with it."""
    result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(builder.nodes, name, [], [result], builder.weights)


def _branched(nested: bool = False) -> onnx.ModelProto:
    """dense - If (two layers on what is captured, or one) - sum; with ``nested`` the two layers are in a second If."""
    then, otherwise, b = Builder(), Builder(), Builder()
    x, ask = b.input("x", 3, 6), b.input("ask", 1, dtype=TensorProto.BOOL)
    hidden = b.op("Relu", b.op("MatMul", x, b.w(6, 12, name="outer")), name="captured")
    inner = then.op("MatMul", hidden, then.w(12, 10, name="t1"), name="inside")
    then_out = then.op("MatMul", then.op("Relu", inner, name="tr"), then.w(10, 4, name="t2"), name="tm")
    branch = _graph("then", then, then_out)
    if nested:
        wrap, other = Builder(), Builder()
        other_out = other.op("MatMul", hidden, other.w(12, 4, name="n1"), name="nm")
        first = wrap.op("If", ask, name="deeper", then_branch=branch, else_branch=_graph("other", other, other_out))
        branch = _graph("outer_then", wrap, first)
    out = otherwise.op("MatMul", hidden, otherwise.w(12, 4, name="e1"), name="em")
    chosen = b.op("If", ask, name="choose", then_branch=branch, else_branch=_graph("else", otherwise, out))
    return b.proto(b.op("Relu", chosen, name="last"))


def _feed(ask: bool) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    return {"x": x, "ask": np.array([ask])}


@pytest.mark.parametrize("nested", [False, True])
def test_a_value_is_seen_where_its_branch_is_taken(nested: bool) -> None:
    model = model_io.load(_branched(nested))
    inner = next(n for n in model.graph.all_nodes() if n.inputs[1:] and n.inputs[1].name.endswith("t1"))
    name = inner.outputs[0].name or ""
    weights = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    there, absent = runtime.tap(model, [name, "x"], [_feed(True), _feed(False)])
    x = _feed(True)["x"]
    want = np.maximum(x @ weights["outer"], 0) @ next(w for n, w in weights.items() if n.endswith("t1"))
    np.testing.assert_allclose(there[name], want, rtol=1e-5)
    np.testing.assert_array_equal(there["x"], x)
    assert absent[name].size == 0


@pytest.mark.parametrize("nested", [False, True])
def test_channels_in_a_branch_are_removed_and_those_it_shares_stay(nested: bool) -> None:
    model = model_io.load(_branched(nested))
    coupled = coupling.analyze(model, _feed(True))
    assert [len(f.atoms) for f in coupled.families] == [10]
    frozen = coupled.frozen()
    assert any(n.endswith("e1") and "leaves out" in why for n, why in frozen.items())
    # The other branch reads what is computed outside, so that stays whole on the axis between them.
    assert coupled.solution.is_frozen(coupled.labels[model.graph.initializers["outer"]][1]).all()
    atoms = some_units(coupled.families, np.random.default_rng(0), 0.5)
    feeds = [_feed(True), _feed(False)]
    assert len(atoms) and difference(coupled, atoms, _feed(True), feeds) <= TOLERANCE


def test_a_branch_is_pruned_by_what_it_reads() -> None:
    model = model_io.load(_branched())
    rng = np.random.default_rng(3)
    samples = [{"x": rng.standard_normal((3, 6)).astype(np.float32), "ask": np.array([True])} for _ in range(16)]
    before = runtime.load(model)(samples[0])
    context = Context(data_io.open_data(samples, data_io.input_specs(model)), threads=1)
    outcome = Prune(ratio=0.2).apply(model, context)
    assert list(outcome.stats["widths"].values()) == [[10, 10 - outcome.stats["removed"]]]
    assert outcome.stats["error_closed"] < outcome.stats["error_masked"]
    after = runtime.load(model)(samples[0])
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
