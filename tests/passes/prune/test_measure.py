"""What a removal means to the outputs: the same, wherever the model is cut, as in the model with it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxslim
from onnxslim import coupling, frontier, runtime
from onnxslim import data as data_io
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.noise import noise
from onnxslim.passes.prune import measure

sys.path.insert(0, str(Path(__file__).parents[2]))
from coupled_graphs import CASES, Case
from nets import net, node, normal

NAMES = ("residual", "squeeze_excite", "attention", "grouped_queries", "shared_weight", "lstm_input", "dense_block")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in NAMES], ids=lambda case: case.name)
def test_errors_are_those_of_the_whole_model(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_io.load(case.build())
    samples = data_io.synthetic(model, 6, seed=0)
    ctx = Context(calibration=samples, threads=1)
    coupled = coupling.analyze(model, samples.feed(samples[0]), threads=1)
    fit, held_out = samples.split(0.4)
    measured = measure.factors(coupled, coupled.families, fit, held_out, ctx)
    removals = [f.atoms[: len(f.atoms) // 2] for f in coupled.families] + [np.zeros(0, np.int64)]
    removals.append(np.concatenate(removals))
    runner = runtime.load(coupled.model, threads=1)
    whole = [runtime.run(runner, feed) for feed in held_out.feeds()]

    def without(atoms: np.ndarray) -> float:
        gone = coupled.removed(atoms)
        trial = coupled.model.clone()
        coupling.mask(trial, coupled.sites, gone)
        for site, factor in measured.items():
            if factor.layer is not None and gone(site.labels).any():
                measure.compensate(trial, factor, gone(site.labels))
        runner = runtime.load(trial, threads=1)
        got = [runtime.run(runner, feed) for feed in held_out.feeds()]
        return noise([(runtime.arrays(a), runtime.arrays(b)) for a, b in zip(whole, got, strict=True)])

    wanted = [without(atoms) for atoms in removals]
    assert max(wanted) > 1e-4
    for limit in (frontier.LIMIT, 0):
        monkeypatch.setattr(frontier, "LIMIT", limit)
        found = measure.sensitivity(coupled, measured, removals, held_out, ctx)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-9)


def _changed(
    nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], changed: dict[str, np.ndarray], x: np.ndarray
) -> float:
    """The noise of a net of ``x`` with ``changed`` in place of some of its ``weights``."""
    outputs = [name for name in ("y", "z") if any(name in n.output for n in nodes)]
    models = [model_io.load(net(nodes, {"x": ["N", *x.shape[1:]]}, w, outputs)) for w in (weights, weights | changed)]
    data = data_io.open_data({"x": x}, data_io.input_specs(models[0]))
    return measure.noise(models[0], models[1:], data, Context(data, threads=1))[0]


def test_an_output_near_0_counts_for_what_it_is() -> None:
    x = np.array([[1e-4]] * 8 + [[0.9], [1.0]] * 8, np.float32)
    found = _changed([node("Add", "x shift")], {"shift": np.float32([0])}, {"shift": np.float32([0.01])}, x)
    assert found == pytest.approx(len(x) * 0.01**2 / np.sum(x**2), rel=0.5)


def test_the_worst_output_counts() -> None:
    x = normal(8, 400)
    nodes = [node("Mul", "x one", "y"), node("Mul", "x other", "z")]
    weights = {"one": np.float32([1]), "other": np.float32([1])}
    assert _changed(nodes, weights, {"other": np.float32([0.5])}, x) == pytest.approx(0.25, abs=0.05)


def test_scores_do_not_hide_behind_boxes() -> None:
    x = normal(8, 4, 16)
    nodes = [
        node("Mul", "x size", "boxes"),
        node("Mul", "x sharpness", "logits"),
        node("Sigmoid", "logits", "scores"),
        node("Concat", "boxes scores", "y", axis=1),
    ]
    weights = {"size": np.float32([100]), "sharpness": np.float32([1])}
    # All scores are 0.5 then: they lose all of their variance, and each kind of numbers may lose four times as much.
    assert _changed(nodes, weights, {"sharpness": np.float32([0])}, x) == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("passes", ["prune", "prune(ratio=0.3)"])
def test_outputs_may_have_other_shapes_without_a_channel(passes: str) -> None:
    """As many results as are found, as behind non-maximum suppression."""
    nodes = [
        node("MatMul", "x w1", "h"),
        node("Relu", "h", "r"),
        node("MatMul", "r w2", "s"),
        node("Greater", "s zero", "found"),
        node("NonZero", "found", "where"),
        node("Transpose", "where", "places", perm=[1, 0]),
        node("GatherND", "s places", "y"),
    ]
    weights = {"w1": normal(8, 32), "w2": normal(32, 16), "zero": np.float32(0)}
    model = net(nodes, {"x": ["N", 8]}, weights)
    result = onnxslim.optimize(model, passes, {"x": normal(24, 8)}, bench=False, threads=1)
    assert result.exit_code == 0, result.report.warnings
    stats = next(p for p in result.report.passes if p["name"] == "prune")["stats"]
    assert stats["families"] == 1


@pytest.mark.parametrize("passes", ["prune", "prune(ratio=0.3)"])
def test_a_product_of_operands_of_different_ranks_is_measured(passes: str) -> None:
    """The table of an embedding is the weight of the last layer too, as in language models."""
    nodes = [
        node("Gather", "table ids", "rows"),
        node("Transpose", "table", "turned", perm=[1, 0]),
        node("MatMul", "rows turned", "y"),
    ]
    graph = helper.make_graph(
        nodes,
        "tied",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6, 128])],
        [numpy_helper.from_array(normal(128, 64), "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    ids = np.random.default_rng(0).integers(0, 128, (12, 6))
    result = onnxslim.optimize(model, passes, {"ids": ids}, bench=False, threads=1)
    assert result.exit_code == 0, result.report.warnings
    assert next(p for p in result.report.passes if p["name"] == "prune")["stats"]["families"] == 1
    if passes != "prune":
        (table,) = result.proto().graph.initializer
        assert table.dims[0] == 128
        assert table.dims[1] < 64
