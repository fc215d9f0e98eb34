"""The pass as a whole, on the demo network and on networks in which what is free is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxslim
from onnxslim import cost, coupling, kernel_steps, pipeline, runtime
from onnxslim import data as data_io
from onnxslim import model as model_io
from onnxslim.contract import Context
from onnxslim.cost import parameters
from onnxslim.errors import UsageError
from onnxslim.noise import noise
from onnxslim.passes.prune import Prune, measure

MODELS = Path(__file__).parents[3] / "models"


def _cnn(seed: int = 0, width: int = 32) -> onnx.ModelProto:
    """Conv 3x3 - Relu - depthwise 3x3 - Relu - Conv 1x1 (+ shortcut) - global pool - Gemm."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        scale = np.sqrt(2 / max(np.prod(shape[1:]), 1))
        return numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("Conv", ["r1", "wd", "bd"], ["c2"], pads=[1, 1, 1, 1], group=width),
        helper.make_node("Relu", ["c2"], ["r2"]),
        helper.make_node("Conv", ["r2", "w2"], ["c3"]),
        helper.make_node("Conv", ["x", "ws"], ["cs"]),
        helper.make_node("Add", ["c3", "cs"], ["a"]),
        helper.make_node("Relu", ["a"], ["r3"]),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "wg", "bg"], ["y"], transB=1),
    ]
    weights = [
        weight("w1", width, 3, 3, 3),
        weight("b1", width),
        weight("wd", width, 1, 3, 3),
        weight("bd", width),
        weight("w2", 16, width, 1, 1),
        weight("ws", 16, 3, 1, 1),
        weight("wg", 5, 16),
        weight("bg", 5),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])
    scores = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])
    graph = helper.make_graph(nodes, "cnn", [image], [scores], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _samples(count: int = 24, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def _context(model: onnx.ModelProto) -> Context:
    loaded = model_io.load(model)
    return Context(data_io.open_data(_samples(), data_io.input_specs(loaded)), threads=1)


def _set(model: onnx.ModelProto, name: str, change: np.ndarray) -> None:
    for k, tensor in enumerate(model.graph.initializer):
        if tensor.name == name:
            model.graph.initializer[k].CopyFrom(numpy_helper.from_array(change, name))


def _get(model: onnx.ModelProto, name: str) -> np.ndarray:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name).copy()


def _difference(first: onnx.ModelProto, second: object, count: int = 4) -> float:
    runners = [runtime.load(model_io.load(m), threads=1) for m in (first, second)]
    worst = 0.0
    for feed in _samples(count, seed=9):
        a, b = (r(feed)["y"] for r in runners)
        worst = max(worst, float(np.abs(a - b).max() / np.abs(a).max()))
    return worst


def test_dead_channels_leave_and_nothing_changes() -> None:
    model = _cnn()
    w1, b1, wd, bd, w2 = (_get(model, n) for n in ("w1", "b1", "wd", "bd", "w2"))
    w1[:8], b1[:8], bd[:8] = 0, 0, 0  # dead: constant 0 after the depthwise layer
    for name, array in zip(("w1", "b1", "wd", "bd", "w2"), (w1, b1, wd, bd, w2), strict=True):
        _set(model, name, array)
    loaded = model_io.load(model)
    Prune(tolerance=1e-6).apply(loaded, _context(model))
    assert loaded.graph.initializers["wd"].shape[0] <= 24
    assert _difference(model, loaded) < 1e-4


def test_refitting_helps_and_the_depthwise_group_follows() -> None:
    model = _cnn()
    results = {}
    for refit in (False, True):
        loaded = model_io.load(model)
        outcome = Prune(ratio=0.3, refit=refit).apply(loaded, _context(model))
        results[refit] = outcome.stats.get("error_refitted", outcome.stats["error_masked"])
        width = loaded.graph.initializers["w1"].shape[0]
        assert width < 32
        depthwise = next(n for n in loaded.graph if n.outputs[0].name == "c2")
        assert depthwise.attributes["group"].as_int() == width
        assert outcome.stats["removed"] > 0
    assert results[True] < results[False]


def _wide(seed: int) -> onnx.ModelProto:
    """Two layers with more channels than a few samples say anything about."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Gemm", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array((rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32), name)
        for name, shape in (("w1", (24, 64)), ("w2", (64, 8)))
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", k]) for n, k in (("x", 24), ("y", 8))]
    graph = helper.make_graph(nodes, "wide", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("count", [8, 24])
def test_the_error_that_is_told_is_that_of_other_samples(count: int) -> None:
    told, true = [], []
    for seed in range(6):
        model = _wide(seed)
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((count + 200, 24)).astype(np.float32)
        loaded = model_io.load(model)
        data = data_io.open_data({"x": x[:count]}, data_io.input_specs(loaded))
        outcome = Prune(ratio=0.3).apply(loaded, Context(data, threads=1))
        told.append(min(v for name, v in outcome.stats.items() if name.startswith("error_")))
        runners = [runtime.load(m, threads=1) for m in (model_io.load(model), loaded)]
        want, got = ([runtime.run(r, {"x": row[None]}) for row in x[count:]] for r in runners)
        true.append(noise([(runtime.arrays(a), runtime.arrays(b)) for a, b in zip(want, got, strict=True)]))
    assert 0.5 < np.sum(told) / np.sum(true) < 2


@pytest.mark.parametrize(("count", "judges"), [(1, 1), (2, 1), (8, 4), (24, 12), (30, 12), (100, 20)])
def test_enough_samples_judge(monkeypatch: pytest.MonkeyPatch, count: int, judges: int) -> None:
    """Few numbers of a model that is mostly sure say nothing of the samples that it is not sure of."""
    model = model_io.load(_wide(0))
    x = np.random.default_rng(0).standard_normal((count, 24)).astype(np.float32)
    data = data_io.open_data({"x": x}, data_io.input_specs(model))
    seen: list[int] = []

    def none(_: object, trials: list[object], held_out: data_io.Data, __: Context) -> list[float]:
        seen.append(len(held_out))
        return [0.0] * len(trials)

    monkeypatch.setattr(measure, "noise", none)
    Prune(ratio=0.3).apply(model, Context(data, threads=1))
    assert seen == [judges]


def test_ratio_saves_its_share_of_parameters() -> None:
    model = _cnn()
    shares = []
    for ratio in (0.0, 0.25, 0.5):
        loaded = model_io.load(model)
        Prune(ratio=ratio).apply(loaded, _context(model))
        shares.append(1 - parameters(loaded) / parameters(model_io.load(model)))
    assert shares[0] == 0
    assert 0.25 <= shares[1] < 0.5
    assert shares[2] >= 0.5


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_budgets_are_met_and_not_by_far(kind: str, share: float) -> None:
    model = _cnn()
    loaded = model_io.load(model)
    ctx = _context(model)
    feed = ctx.calibration.feed(ctx.calibration[0])
    before, absolute = cost.analyze(loaded, feed), model_io.load(model)
    field = {"params": "parameters", "macs": "macs"}[kind]
    Prune(**{kind: share}).apply(loaded, ctx)
    left = getattr(cost.analyze(loaded, feed), field) / getattr(before, field)
    assert share - 0.2 < left <= share + 1e-6
    Prune(**{kind: share * getattr(before, field)}).apply(absolute, ctx)
    assert getattr(cost.analyze(absolute, feed), field) <= share * getattr(before, field)


def test_a_budget_out_of_reach_is_said_to_be() -> None:
    model = _cnn()
    loaded = model_io.load(model)
    ctx = _context(model)
    Prune(params=0.001).apply(loaded, ctx)
    assert any("params came down to" in line for line in ctx.warnings)


def test_a_time_budget_times_the_plan_it_takes() -> None:
    model = _cnn(width=64)
    loaded = model_io.load(model)
    outcome = Prune(latency=0.6).apply(loaded, _context(model))
    assert outcome.stats["removed"] > 0
    assert outcome.stats["left"] > 0


def test_only_a_time_budget_asks_the_kernels_for_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def step() -> int:
        asked.append(True)
        return 32

    monkeypatch.setattr(kernel_steps, "here", step)
    model = _cnn(width=128)
    Prune(ratio=0.3).apply(model_io.load(model), _context(model))
    assert not asked
    loaded = model_io.load(model)
    Prune(latency=0.7, refit=False).apply(loaded, _context(model))
    assert asked == [True]
    assert loaded.graph.initializers["w1"].shape[0] in (32, 64, 96, 128)


def test_plain_criteria_are_what_they_say() -> None:
    model = model_io.load(_cnn())
    ctx = _context(_cnn())
    coupled = coupling.analyze(model, ctx.calibration.feed(ctx.calibration[0]), threads=1)
    family = next(f for f in coupled.families if len(f.atoms) == 32)
    fit, held = ctx.calibration.split(0.2)
    told = measure.contributions(coupled, family, measure.factors(coupled, [family], fit, held, ctx))
    orders = {kind: measure.ranked(kind, coupled, family, told) for kind in ("variance", "magnitude", "median")}
    assert measure.ranked("obs", coupled, family, told) is None
    inner, outer = _get(_cnn(), "wd").reshape(32, -1), _get(_cnn(), "w2")[:, :, 0, 0]
    seen = [v["r2"] for v in runtime.tap(model, ["r2"], fit.feeds(), threads=1)]
    spread = np.concatenate(seen).transpose(1, 0, 2, 3).reshape(32, -1).var(axis=1) * (outer**2).sum(axis=0)
    rows = np.concatenate(
        [a / np.sqrt(np.mean(a**2)) for a in (_get(_cnn(), "w1").reshape(32, -1), inner, outer.T)]
        + [a[:, None] / np.sqrt(np.mean(a**2)) for a in (_get(_cnn(), "b1"), _get(_cnn(), "bd"))],
        axis=1,
    )
    apart = np.linalg.norm(rows[:, None] - rows[None], axis=2).sum(axis=1)
    for kind, scores in (("variance", spread), ("magnitude", (rows**2).sum(axis=1)), ("median", apart)):
        found = orders[kind]
        assert found is not None and sorted(found.tolist()) == list(range(32))
        assert (np.diff(scores[found]) >= -1e-3 * scores.max()).all(), kind


def test_only_what_matches_shrinks() -> None:
    model = _cnn()
    loaded = model_io.load(model)
    outcome = Prune(params=0.7, only=("^wg$",)).apply(loaded, _context(model))
    assert loaded.graph.initializers["w1"].shape == [32, 3, 3, 3]
    assert loaded.graph.initializers["wg"].shape != [5, 16]
    assert any("only" in skip.reason for skip in outcome.skipped)


def test_protected_families_stay_whole_and_are_named() -> None:
    model = _cnn()
    loaded = model_io.load(model)
    outcome = Prune(ratio=0.5, protect=("^w1$",)).apply(loaded, _context(model))
    assert loaded.graph.initializers["w1"].shape == [32, 3, 3, 3]
    assert any("protected" in skip.reason for skip in outcome.skipped)
    assert loaded.graph.initializers["wg"].shape != [5, 16]


def test_overrides_alone_cut_what_they_name_and_nothing_else() -> None:
    model = _cnn()
    loaded = model_io.load(model)
    outcome = Prune(overrides={"^w1$": 0.3}).apply(loaded, _context(model))
    assert loaded.graph.initializers["w1"].shape == [32 - round(0.3 * 32), 3, 3, 3]
    assert loaded.graph.initializers["wg"].shape == [5, 16]
    assert any(skip.reason == "no override names it" for skip in outcome.skipped)


def test_a_budget_is_met_around_overrides() -> None:
    model = _cnn()
    loaded = model_io.load(model)
    outcome = Prune(params=0.6, overrides={"^wg$": 0.0, "w": 0.25}).apply(loaded, _context(model))
    # The first that matches counts: "w" is in all the names, and also in that of wg.
    assert loaded.graph.initializers["wg"].shape == [5, 16]
    assert loaded.graph.initializers["w1"].shape == [24, 3, 3, 3]
    assert any(skip.reason == "kept whole by overrides" for skip in outcome.skipped)
    loaded = model_io.load(model)
    Prune(params=0.6, overrides={"^wg$": 0.25}).apply(loaded, _context(model))
    assert loaded.graph.initializers["wg"].shape == [5, 12]
    assert parameters(loaded) <= 0.6 * parameters(model_io.load(model))


def test_an_override_that_matches_nothing_is_refused() -> None:
    model = _cnn()
    with pytest.raises(UsageError, match="'head' matches no family"):
        Prune(overrides={"head": 0.5}).apply(model_io.load(model), _context(model))


def test_without_data_only_a_ratio_prunes() -> None:
    model = _cnn()
    loaded = model_io.load(model)
    ctx = Context(data_io.synthetic(loaded, 4, seed=0), synthetic=True, threads=1)
    before = parameters(loaded)
    outcome = Prune().apply(loaded, ctx)
    assert parameters(loaded) == before
    assert any("no calibration data" in skip.reason for skip in outcome.skipped)
    Prune(ratio=0.3).apply(loaded, ctx)
    assert parameters(loaded) < before


def test_same_input_same_bytes() -> None:
    model = _cnn()
    contents = []
    for _ in range(2):
        loaded = model_io.load(model)
        Prune(ratio=0.3).apply(loaded, _context(model))
        contents.append(model_io.to_bytes(loaded))
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "text",
    [
        "prune(ratio=1.5)",
        "prune(ratio=-0.1)",
        "prune(tolerance=-1)",
        "prune(protect='(')",
        "prune(macs=0)",
        "prune(ratio=0.1, macs=0.9)",
        "prune(only='(')",
        "prune(importance=best)",
        "prune(overrides={'(': 0.1})",
        "prune(overrides={'conv': 1})",
        "prune(overrides={'conv': -0.1})",
        "prune(overrides={'conv': low})",
        "prune(overrides={'conv': 0.1, 'conv': 0.2})",
        "prune(overrides=0.5)",
        "prune(overrides={'conv': 0.1}, lossless=true)",
        "prune(overrides={'conv': 0.1}, plan='p.json')",
    ],
)
def test_bad_options_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="prune"):
        pipeline.parse(text)


def test_demo_network_keeps_its_accuracy_at_half_the_work() -> None:
    with np.load(MODELS / "fmnist_calib.npz") as calib, np.load(MODELS / "fmnist_eval.npz") as evaluation:
        images = calib["image"]
        held_out, labels = evaluation["image"], evaluation["labels"]
    samples = [{"image": images[k : k + 1]} for k in range(0, 256, 2)]
    test = [{"image": held_out[k : k + 1], "labels": labels[k : k + 1]} for k in range(1000)]
    result = onnxslim.optimize(
        str(MODELS / "fmnist_cnn.onnx"),
        "prune(ratio=0.2)",
        calibration=samples,
        evaluation=test,
        metric="top1",
        threads=2,
        bench=False,
    )
    report = result.report
    assert report.after["parameters"] < 0.8 * report.before["parameters"]
    assert report.metric["after"] >= report.metric["before"] - 0.015


@pytest.mark.parametrize("passes", ["prune(ratio=0.5)", "prune(macs=0.5)"])
def test_a_budget_for_a_model_that_cannot_shrink_says_why(passes: str) -> None:
    weight = numpy_helper.from_array(np.random.default_rng(2).standard_normal((4, 3)).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result = onnxslim.optimize(model, passes)
    assert result.exit_code == 0
    assert any("no channels can leave" in line and "cannot be cut" in line for line in result.report.warnings)
    assert not any("no channels can leave" in line for line in onnxslim.optimize(model, "prune").report.warnings)


def test_a_layer_whose_output_is_spread_over_another_is_refitted_alone() -> None:
    rng = np.random.default_rng(4)
    sizes = {"w": (6, 24), "once": (24, 1), "each": (6, 3)}
    weights = [numpy_helper.from_array(rng.standard_normal(s).astype(np.float32), n) for n, s in sizes.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "each"], ["scores"]),
        helper.make_node("MatMul", ["x", "w"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "once"], ["quality"]),
        helper.make_node("Add", ["scores", "quality"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(nodes, "spread", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    samples = {"x": rng.standard_normal((64, 6)).astype(np.float32)}
    result = onnxslim.optimize(model, "prune(ratio=0.3)", calibration=samples)
    assert result.exit_code == 0
    assert cost.parameters(result.model) <= 0.7 * cost.parameters(model_io.load(model))
    assert not any("undone" in line for line in result.report.warnings)
