"""`optimize` as a whole: what is kept, what is undone, and what the report says about it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

sys.path.insert(0, str(Path(__file__).parent))

from results_of import answer, kept, optimize

import onnxslim
from onnxslim import checks, pipeline, runtime, timing
from onnxslim import model as model_io
from onnxslim.contract import Context, Effect, Outcome, Pass
from onnxslim.errors import DataError, ModelError, UsageError
from onnxslim.graph import constant, set_constant

Maker = Callable[..., dict[str, np.ndarray]]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)


def test_nothing_asked_nothing_changed(tiny: Path) -> None:
    before = tiny.read_bytes()
    result = optimize(tiny)
    assert tiny.read_bytes() == before
    assert result.exit_code == 0
    assert np.allclose(answer(result.model), answer(tiny), atol=1e-6)
    assert result.report.before["nodes"] == result.report.after["nodes"] == 5
    assert result.report.fidelity is not None
    assert result.report.fidelity["outputs"][0]["relative_l2"] < 1e-6
    assert "synthetic inputs" in result.report.warnings[0]
    assert result.report.bench == []


@pytest.mark.parametrize("own", [True, False])
def test_the_file_may_go_when_its_weights_are_owned(tmp_path: Path, own: bool) -> None:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[512] x) => (float[512] y) {}')
    model.graph.node.append(helper.make_node("Add", ["x", "large"], ["y"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(512, dtype=np.float32), "large"))
    path = tmp_path / "in.onnx"
    onnx.save(model, path)
    result = onnxslim.optimize(path, [], bench=False, own=own)
    path.unlink()
    if own:
        assert result.save(tmp_path / "out.onnx").is_file()
    else:
        with pytest.raises(ModelError, match="cannot write"):
            result.save(tmp_path / "out.onnx")


def test_result_is_saved_and_given_as_a_message(tiny: Path, tmp_path: Path) -> None:
    result = optimize(tiny)
    saved = onnx.load(result.save(tmp_path / "out.onnx"))
    assert saved == result.proto()
    assert {p.key: p.value for p in saved.metadata_props} == {
        "onnxslim.version": onnxslim.__version__,
        "onnxslim.pipeline": "keep",
    }
    assert result.report.after["bytes"] == (tmp_path / "out.onnx").stat().st_size
    assert result.report.before["bytes"] == tiny.stat().st_size


def test_every_pipeline_that_made_the_model_is_in_its_metadata(tiny: Path) -> None:
    once = optimize(tiny, "keep(level=2)").proto()
    twice = optimize(once, "keep").proto()
    thrice = optimize(twice, "keep").proto()
    assert {p.key: p.value for p in twice.metadata_props}["onnxslim.pipeline"] == "keep(level=2);keep"
    assert thrice == twice


def test_same_input_same_bytes(tiny: Path, samples: Maker) -> None:
    results = [optimize(tiny, "scale", calibration=samples(), seed=4) for _ in range(2)]
    assert model_io.to_bytes(results[0].model) == model_io.to_bytes(results[1].model)


@pytest.mark.parametrize("by", [1.01, 0.0])
def test_a_broken_promise_is_undone_and_fails(tiny: Path, by: float) -> None:
    result = optimize(tiny, f"lie(by={by}),keep")
    assert result.exit_code == 1
    assert np.allclose(answer(result.model), answer(tiny), atol=1e-6)
    assert "CHECK FAILED" in "\n".join(result.report.warnings)
    lie, keep = result.report.passes
    assert lie["skipped"][-1]["reason"].startswith("undone: output 'y': relative error")
    assert keep["stats"] == {"kept": 5}
    assert kept(result) == "keep"


def test_passes_that_hold_together_are_not_run_one_by_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def load(*args: Any, **options: Any) -> runtime.Runner:
        loaded.append(args)
        return runtime.load(*args[1:], **options)

    monkeypatch.setattr(runtime, "load_lean", load)
    result = optimize(tiny, "keep,lie(by=1.00001),keep(level=2)")
    assert result.exit_code == 0
    assert kept(result) == "keep,lie(by=1.00001),keep(level=2)"
    assert len(loaded) == 2  # the original and the result
    loaded.clear()
    assert kept(optimize(tiny, "keep,lie,keep(level=2)")) == "keep,keep(level=2)"
    assert len(loaded) > 4


def test_small_lies_that_add_up_are_undone(tiny: Path) -> None:
    text = ",".join(["lie(by=1.00008)"] * 4)
    result = optimize(tiny, text)
    assert result.exit_code == 1
    assert result.report.fidelity is not None
    assert result.report.fidelity["outputs"][0]["relative_l2"] <= 1e-4
    assert "over all passes" in "\n".join(result.report.warnings)


def test_a_pass_that_adds_nodes_is_dropped_and_named(tiny: Path) -> None:
    result = optimize(tiny, "grow")
    assert result.exit_code == 0
    assert result.report.after["nodes"] == 5
    assert any("grow was undone: adds 1 nodes" in line for line in result.report.warnings)


def test_a_crash_leaves_a_reproduction(tiny: Path, tmp_path: Path) -> None:
    for name in ("repro", "repro-2"):
        result = optimize(tiny, "keep,crash,keep(level=2)")
        assert result.exit_code == 123
        assert result.repro == tmp_path / name
        assert np.allclose(answer(result.model), answer(tiny), atol=1e-6)
    folder = tmp_path / "repro"
    assert (folder / "pipeline.txt").read_text() == "crash\n"
    assert "ZeroDivisionError: on purpose" in (folder / "error.txt").read_text()
    assert np.allclose(answer(folder / "model.onnx"), answer(tiny), atol=1e-6)


def test_a_pass_that_changes_the_interface_is_undone(tiny: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Rename(Pass):
        name: ClassVar[str] = "rename"
        effect: ClassVar[Effect] = Effect.LOSSY

        def apply(self, model: ir.Model, ctx: Context) -> Outcome:
            model.graph.outputs[0].name = "other"
            return Outcome()

    result = optimize(tiny, [Rename()])
    assert [o.name for o in result.proto().graph.output] == ["y"]
    assert "changes the outputs" in result.report.passes[0]["skipped"][0]["reason"]


def test_a_frozen_batch_is_found_out(tiny: Path) -> None:
    @dataclasses.dataclass(frozen=True)
    class Freeze(Pass):
        """Right for one sample, wrong for two."""

        name: ClassVar[str] = "freeze"
        effect: ClassVar[Effect] = Effect.EXACT

        def apply(self, model: ir.Model, ctx: Context) -> Outcome:
            flatten = next(node for node in model.graph if node.op_type == "Flatten")
            shape = ir.Value(name="shape", const_value=ir.tensor(np.array([1, 4]), name="shape"))
            model.graph.register_initializer(shape)
            node = ir.node("Reshape", [flatten.inputs[0], shape], name="reshape")
            node.outputs[0].name = "reshaped"
            model.graph.insert_before(flatten, node)
            flatten.outputs[0].replace_all_uses_with(node.outputs[0])
            model.graph.remove(flatten, safe=True)
            return Outcome()

    result = optimize(tiny, [Freeze()])
    assert result.exit_code == 1
    assert np.allclose(answer(result.model), answer(tiny), atol=1e-6)


def test_a_lossy_pass_reports_its_fidelity(tiny: Path, samples: Maker) -> None:
    result = optimize(tiny, "scale(by=0.5)", calibration=samples(8))
    assert result.exit_code == 0
    assert [p["name"] for p in result.report.passes] == ["keep", "scale"]
    assert result.report.passes[1]["stats"]["samples"] == 6, "a quarter is held out"
    assert result.report.fidelity is not None
    assert result.report.fidelity["held_out"]
    assert result.report.fidelity["samples"] == 2
    assert result.report.fidelity["outputs"][0]["relative_l2"] > 0.1


@pytest.mark.parametrize(("fidelity", "said"), [(0.0, False), (0.99, True), (0.6, False)])
def test_samples_that_lose_more_than_was_allowed_are_named(
    tiny: Path, samples: Maker, fidelity: float, said: bool
) -> None:
    result = optimize(tiny, f"scale(by=0.5,fidelity={fidelity})", calibration=samples(8))
    assert any("samples that no pass has seen lose" in line for line in result.report.warnings) == said
    seen = samples(8)
    result = optimize(tiny, f"scale(by=0.5,fidelity={fidelity})", calibration=seen, evaluation=seen)
    assert not any("samples that no pass has seen" in line for line in result.report.warnings)


def test_nothing_is_said_of_samples_whose_outputs_are_choices(tiny: Path, samples: Maker) -> None:
    model = onnx.load(tiny)
    scores = model.graph.output[0]
    model.graph.node.append(onnx.helper.make_node("ArgMax", [scores.name], ["label"], axis=1))
    model.graph.output.append(onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, None))
    for told in (True, False):
        result = optimize(model, "scale(by=0.5,fidelity=0.99)", calibration=samples(8))
        assert any("samples that no pass has seen lose" in line for line in result.report.warnings) == told
        del model.graph.output[0]


def test_calibration_keeps_all_samples_when_others_judge(tiny: Path, samples: Maker) -> None:
    result = optimize(tiny, "scale", calibration=samples(8), evaluation=samples(5))
    assert result.report.passes[1]["stats"]["samples"] == 8
    assert result.report.fidelity is not None
    assert (result.report.fidelity["samples"], result.report.fidelity["held_out"]) == (5, True)
    twice = samples(8)
    seen = optimize(tiny, "scale", calibration=twice, evaluation=twice).report.fidelity
    assert seen is not None
    assert not seen["held_out"], "they are the same samples"


def test_a_pass_without_data_is_named(tiny: Path) -> None:
    result = optimize(tiny, "scale")
    assert result.report.warnings[0] == "synthetic inputs: no calibration data for scale; give --calib"


def test_a_nan_is_a_warning_of_a_lossy_result(tiny: Path, samples: Maker) -> None:
    result = optimize(tiny, "scale(by=1e38)", calibration=samples())
    assert "NaN or infinite" in result.report.warnings[0]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"calibration": {"z": np.zeros((2, 2))}}, DataError),
        ({"calibration": {"x": np.zeros((2, 2, 8, 8))}}, DataError),
        ({"calibration": "nowhere.npz"}, DataError),
        ({"evaluation": {"x": np.zeros((2, 9, 8, 8), np.float32)}}, DataError),
        ({"metric": "top2"}, UsageError),
        ({"max_drop": "much"}, UsageError),
        ({"target": "tpu"}, UsageError),
        ({"shapes": {"q": [1]}}, UsageError),
        ({"fix_shapes": {"x": [1, 2]}}, UsageError),
        ({"text": "keep(level=-1)"}, UsageError),
        ({"text": "last,scale"}, UsageError),
    ],
)
def test_unusable_arguments(tiny: Path, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        optimize(tiny, **options)


def test_shapes_are_for_measuring_and_fixed_shapes_for_good(tiny: Path) -> None:
    measured = optimize(tiny, shapes={"x": [4, 2, 8, 8]})
    assert measured.report.environment["shapes"] == {"x": [4, 2, 8, 8]}
    assert measured.report.after["macs"] == 4 * optimize(tiny).report.after["macs"]
    assert measured.proto().graph.input[0].type.tensor_type.shape.dim[0].dim_param == "n"
    fixed = optimize(tiny, fix_shapes={"x": [4, 2, 8, 8]})
    assert fixed.proto().graph.output[0].type.tensor_type.shape.dim[0].dim_value == 4
    assert fixed.report.environment["shapes"] == {"x": [4, 2, 8, 8]}


def _odd(op: str = "Own", domain: str = "own") -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_a_model_that_cannot_run_here_is_left_unverified_and_said() -> None:
    result = optimize(_odd())
    assert result.exit_code == 0
    assert result.report.warnings[0].startswith("NOT VERIFIED")
    assert result.report.fidelity is None
    with pytest.raises(ModelError, match="cannot load it"):
        optimize(_odd(), "scale")
    with pytest.raises(ModelError, match="cannot load it"):
        optimize(_odd(), "keep", calibration=[{"x": np.zeros(1, np.float32)}])


def test_inputs_that_are_no_tensors() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (seq(float[2]) s) => (float[n] y) { y = ConcatFromSequence<axis = 0>(s) }
    """)
    assert "NOT VERIFIED" in optimize(proto).report.warnings[0]
    with pytest.raises(DataError, match="not a tensor"):
        optimize(proto, calibration=[{}])


def test_outputs_that_are_no_tensors() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4, 2] x) => (seq(float[1, 2]) y) { y = SplitToSequence(x) }
    """)
    result = optimize(proto)
    assert result.exit_code == 0
    assert result.report.fidelity is not None
    assert len(result.report.fidelity["outputs"]) == 4


def test_a_random_model_is_held_to_its_own_noise() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4, 2] x) => (float[4, 2] y) { r = RandomNormalLike(x) y = Add(x, r) }
    """)
    result = optimize(proto)
    assert result.exit_code == 0
    assert any("does not repeat itself" in line for line in result.report.warnings)


def test_latency_is_measured_against_the_file(tiny: Path) -> None:
    result = optimize(tiny, bench=True, bench_seconds=0.1)
    (entry,) = result.report.bench
    assert entry["ep"] == "cpu"
    assert entry["interval"][0] <= entry["speedup"] <= entry["interval"][1]
    assert json.loads(result.report.to_json())["bench"][0]["latency_ms"]["median"] > 0


def test_a_lossless_pass_that_makes_it_slower_is_dropped(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class Slow(Pass):
        """Changes a name, and a counterfeit clock finds the result slow."""

        name: ClassVar[str] = "slow"
        effect: ClassVar[Effect] = Effect.ROUNDING

        def apply(self, model: ir.Model, ctx: Context) -> Outcome:
            model.metadata_props["slow"] = "yes"
            return Outcome()

    def fake(sources: Any, feeds: Any, **_: Any) -> timing.Comparison:
        slow = [isinstance(s, ir.Model) and "slow" in s.metadata_props for s in sources]
        speeds = [0.5 if is_slow else 1.0 for is_slow in slow]
        latency = [timing.Latency(1 / s, 1 / s, 1 / s, 9) for s in speeds]
        return timing.Comparison(latency, speeds, [(s * 0.99, s * 1.01) for s in speeds])

    monkeypatch.setattr(runtime, "compare_models", fake)
    keep, again = pipeline.parse("keep,keep(level=2)")
    result = optimize(tiny, [keep, Slow(), again], bench=True)
    assert "slow was dropped: it made the model slower (0.50x)" in "\n".join(result.report.warnings)
    assert [p["name"] for p in result.report.passes] == ["keep", "keep"]
    assert "slow" not in result.model.metadata_props
    assert result.report.bench[0]["speedup"] == 1.0


def test_a_pass_is_dropped_only_when_the_interval_says_it_is_slower(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(interval: tuple[float, float]) -> Any:
        latency = [timing.Latency(1.0, 1.0, 1.0, 9)] * 2
        compared = timing.Comparison(latency, [1.0, 0.95], [(1.0, 1.0), interval])
        monkeypatch.setattr(runtime, "compare_models", lambda *_, **__: compared)
        return optimize(tiny, bench=True)

    noisy = fake((0.87, 1.03))
    assert kept(noisy) == "keep"
    assert noisy.report.bench[0]["interval"] == [0.87, 1.03]
    assert kept(fake((0.93, 0.97))) == "", "slower beyond noise"


def test_progress_is_shown(tiny: Path) -> None:
    labels: list[str] = []

    class Recorder:
        def track(self, items: Any, *, total: int | None = None, label: str = "") -> Any:
            labels.append(label)
            yield from items

    optimize(tiny, progress=Recorder())
    assert {"passes", "evaluate"} <= set(labels)


def test_the_demo_model_in_every_form(cnn: dict[str, str]) -> None:
    proto = onnx.load(cnn["model"])
    results = [optimize(form) for form in (cnn["model"], proto, proto.SerializeToString(), ir.from_proto(proto))]
    assert len({model_io.to_bytes(r.model) for r in results}) == 1
    assert len({json.dumps(r.report.fidelity) for r in results}) == 1


def test_check_samples_add_a_batch_only_where_it_runs(tiny: Path, samples: Maker) -> None:
    model = model_io.load(tiny)
    from onnxslim.data import input_specs, open_data

    data = open_data({"x": samples(6)["x"]}, input_specs(model))
    shapes = [s["x"].shape[0] for s in checks.check_samples(runtime.load(tiny), data, 3)]
    assert shapes == [1, 1, 1, 2]


def test_weights_of_the_given_model_are_not_touched(proto: onnx.ModelProto, samples: Maker) -> None:
    model = ir.from_proto(proto)
    before = {n: np.array(v.const_value) for n, v in model.graph.initializers.items()}
    optimize(model, "scale(by=0.5)", calibration=samples())
    assert all(np.array_equal(before[n], np.array(v.const_value)) for n, v in model.graph.initializers.items())
    copy = model_io.load(model)
    weight = copy.graph.initializers["w1"]
    array = constant(weight)
    assert array is not None
    set_constant(weight, array * 2)
    assert np.array_equal(before["w1"], np.array(model.graph.initializers["w1"].const_value))


def test_generated_inputs_grow_until_the_model_runs() -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n, t] x) => (float[n, 1, u] y) <float[1, 1, 200] w = {0}, int64[1] one = {1}> {
            e = Unsqueeze(x, one)
            y = Conv(e, w)
        }
    """)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((1, 1, 200), np.float32), "w"))
    result = optimize(proto)
    assert result.report.environment["shapes"] == {"x": [1, 256]}
    assert result.report.fidelity is not None
