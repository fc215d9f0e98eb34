"""Sessions, tapped values and interleaved latency."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.errors import ModelError, UsageError

X = np.random.default_rng(0).standard_normal((2, 2, 8, 8)).astype(np.float32)


def test_model_bytes_and_file_give_the_same(proto: onnx.ModelProto, tiny: Path) -> None:
    model = model_io.load(proto)
    answers = [runtime.load(source)({"x": X})["y"] for source in (model, model_io.to_bytes(model), tiny, str(tiny))]
    assert all(np.allclose(a, answers[0], atol=1e-6) for a in answers)


def test_large_models_are_loaded_from_disk(proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_io.load(proto)
    wanted = runtime.load(model)({"x": X})["y"]
    monkeypatch.setattr(runtime, "IN_MEMORY", 0)
    monkeypatch.setattr(model_io, "to_bytes", lambda _: pytest.fail("the weights were serialized"))
    assert np.array_equal(runtime.load(model)({"x": X})["y"], wanted)


def test_a_runner_that_rests_holds_no_session(tiny: Path) -> None:
    runner = runtime.load(tiny)
    wanted = runner({"x": X})["y"]
    session = weakref.ref(runner.session._sess)
    runner.rest()
    gc.collect()
    assert session() is None
    assert np.array_equal(runner({"x": X})["y"], wanted)


def test_unknown_and_missing_providers_are_usage_errors(proto: onnx.ModelProto) -> None:
    model = model_io.load(proto)
    with pytest.raises(UsageError, match="give one of cpu, cuda, openvino"):
        runtime.load(model, ep="tpu")
    for ep, package in (("cuda", "onnxruntime-gpu"), ("openvino", "onnxruntime-openvino")):
        if not runtime.available(ep):
            with pytest.raises(UsageError, match=package):
                runtime.load(model, ep=ep)


def test_a_refused_model_and_a_failing_input_are_model_errors(proto: onnx.ModelProto) -> None:
    with pytest.raises(ModelError, match="ONNX Runtime cannot load it"):
        runtime.load(b"nonsense")
    runner = runtime.load(model_io.load(proto))
    with pytest.raises(ModelError, match=r"it: fails on inputs \{'x': \[2, 3, 8, 8\]\}") as caught:
        runtime.run(runner, {"x": np.zeros((2, 3, 8, 8), np.float32)}, "it")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        runtime.run(runner, {})


def test_tap_yields_what_the_whole_model_computes(proto: onnx.ModelProto) -> None:
    model = model_io.load(proto)
    before = model_io.to_bytes(model)
    feeds = [{"x": X[:1]}, {"x": X[1:]}]
    rows = list(runtime.tap(model, ["x", "c", "f", "y"], feeds))
    w2 = np.asarray(model.graph.initializers["w2"].const_value)
    b2 = np.asarray(model.graph.initializers["b2"].const_value)
    for row, feed in zip(rows, feeds, strict=True):
        assert np.array_equal(row["x"], feed["x"])
        assert np.allclose(np.maximum(row["c"], 0).mean((2, 3)), row["f"], atol=1e-5)
        assert np.allclose(row["f"] @ w2 + b2, row["y"], atol=1e-5)
    assert model_io.to_bytes(model) == before


def test_tap_holds_no_values_of_one_sample_while_the_next_runs(proto: onnx.ModelProto) -> None:
    held: list[weakref.ref[np.ndarray]] = []

    def feeds() -> Iterator[dict[str, np.ndarray]]:
        for _ in range(3):
            assert not any(value() is not None for value in held)
            held.clear()
            yield {"x": X}

    for values in runtime.tap(model_io.load(proto), ["c", "y"], feeds()):
        held += [weakref.ref(values.pop(name)) for name in ("c", "y")]
    assert len(held) == 2


def test_tap_computes_only_what_is_needed(proto: onnx.ModelProto) -> None:
    # The part behind the tapped value would fail on this input.
    proto.graph.node[4].input[1] = "w1"
    (row,) = runtime.tap(_unchecked(proto), ["r"], [{"x": X}])
    assert row["r"].shape == (2, 4, 8, 8)


def _unchecked(proto: onnx.ModelProto) -> Any:
    import onnx_ir as ir

    return ir.from_proto(proto)


def test_tap_of_inputs_alone_runs_nothing(proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "load", lambda *_, **__: pytest.fail("a session was made"))
    (row,) = runtime.tap(model_io.load(proto), ["x"], [{"x": X}])
    assert np.array_equal(row["x"], X)


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_models_are_compared_in_new_sessions(
    proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    made = []
    session = ort.InferenceSession
    monkeypatch.setattr(ort, "InferenceSession", lambda *args, **more: made.append(args) or session(*args, **more))
    model = model_io.load(proto)
    compared = runtime.compare_models([model, model_io.to_bytes(model)], [{"x": X}], threads=1, seconds=seconds)
    assert len(made) == 2 * compared.blocks
    assert compared.blocks == 4 if seconds == 0 else 4 < compared.blocks <= 12
    assert compared.interval[0] == (1.0, 1.0)


def test_the_runtime_s_own_graph_is_shown(proto: onnx.ModelProto) -> None:
    shown = runtime.optimized(model_io.load(proto))
    assert "Relu" not in {node.op_type for node in shown.graph}, "ONNX Runtime fuses Conv and Relu"


def test_types_that_numpy_lacks_are_tapped_as_float32() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
    ]
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, [3])] for n in "xy")
    info = [helper.make_tensor_value_info("b", TensorProto.BFLOAT16, [3])]
    graph = helper.make_graph(nodes, "casts", inputs, outputs, value_info=info)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    x = np.array([1, 0.5, 1 + 2**-10], np.float32)
    (values,) = runtime.tap(model, ["b", "y"], [{"x": x}])
    assert values["b"].dtype == np.float32
    np.testing.assert_array_equal(values["b"], [1, 0.5, 1])
    np.testing.assert_array_equal(values["b"], values["y"])


@pytest.mark.parametrize(("seconds", "want"), [(60.0, 5), (0.0, 2)])
def test_a_profile_goes_on_for_its_rounds_or_its_time(
    proto: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, seconds: float, want: int
) -> None:
    calls: list[Any] = []
    run = runtime.Runner.__call__
    monkeypatch.setattr(runtime.Runner, "__call__", lambda self, feed: calls.append(feed) or run(self, feed))
    times = runtime.profile(model_io.load(proto), [{"x": X}, {"x": -X}], rounds=5, seconds=seconds)
    assert len(calls) == 2 * want
    assert 0 < sum(times.values()) < 1000
