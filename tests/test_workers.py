"""Workers: the real one on the CPU; what is asked of CUDA and plugins is answered by a stand-in for onnxruntime."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from onnxslim import bench, eps, worker, workers
from onnxslim.errors import ModelError, UsageError

X = np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32)


@pytest.fixture
def cpu(tmp_path: Path) -> Iterator[workers.Process]:
    with workers.start(eps.Ep("cpu"), tmp_path) as process:
        yield process


def test_a_worker_computes_what_the_model_does(cpu: workers.Process, tiny: Path, tmp_path: Path) -> None:
    from onnxslim import runtime

    feeds = workers.write_feeds([{"x": X}, {"x": 2 * X}], tmp_path, "f")
    common = {"path": str(tiny), "ep": cpu.request, "threads": 1}
    assert cpu.ask("run", feeds=feeds, out=str(tmp_path / "out.npz"), **common) == ["y"]
    with np.load(tmp_path / "out.npz") as got:
        assert np.allclose(got["1:y"], runtime.load(tiny)({"x": 2 * X})["y"], atol=1e-5)
    found = cpu.ask("block", models=[{**common, "feeds": feeds}] * 2, ep=cpu.request, seconds=0.01, seed="0")
    assert np.array(found["rounds"]).shape[1] == 2
    assert min(map(min, found["rounds"])) > 0
    placed = cpu.ask("placement", **common)
    assert placed["providers"] == ["CPUExecutionProvider"]
    rows = cpu.ask("profile", feeds=feeds, rounds=4, **common)
    assert {"Conv", "Gemm"} <= {row["operator"] for row in rows}
    assert all(row["ms"] > 0 and row["calls"] == 1 for row in rows)


def test_a_worker_starts_where_no_folder_is_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with workers.start(eps.Ep("cpu"), tmp_path) as process:
        assert process.facts["available"]


def test_names_of_inputs_and_texts_survive(tmp_path: Path) -> None:
    feed = {"file": np.ones(2), "a/b": np.array(["é", "xyz"], object)}
    (path,) = workers.write_feeds([feed], tmp_path, "f")
    (back,) = worker.read_feeds([path])
    assert list(back) == list(feed)
    assert all(np.array_equal(back[k], feed[k]) and back[k].dtype == feed[k].dtype for k in feed)


def test_what_fails_in_a_worker_is_said_and_the_worker_lives(cpu: workers.Process, tiny: Path, tmp_path: Path) -> None:
    feeds = workers.write_feeds([{"z": X}], tmp_path, "f")
    with pytest.raises(ModelError, match=r"cpu: .*has the input 'x', the samples have"):
        cpu.ask("cold", path=str(tiny), ep=cpu.request, feeds=feeds, threads=1)
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError):
        cpu.ask("placement", path=str(tmp_path / "bad.onnx"), ep=cpu.request, threads=1)
    assert cpu.ask("hello", ep=cpu.request)["available"]


def test_a_runtime_that_was_imported_first_is_muted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    muted: list[bool] = []
    stand_in = SimpleNamespace(disable_telemetry_events=lambda: muted.append(True))
    for value, wanted in (("0", []), ("1", [True])):
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", value)
        worker.mute(stand_in)
        assert muted == wanted


def test_an_interpreter_without_onnxruntime_is_missing(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(workers.MissingError, match=r"ended with code 3.*; install it with: .*pip install onnxruntime"):
        workers.start(eps.Ep("cpu", {}, str(python)), tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no call that binds a process to cores")
def test_a_wrong_option_is_not_answered_with_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(workers.MissingError, match=r"no such core; there are \[[\d, ]+\]$"):
        workers.start(eps.Ep("cpu", {"affinity": (9999,)}), tmp_path)


# CUDA and plugins, by a stand-in


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes onnxruntime of the next workers the stand-in; returns the log of what is done with it."""
    shutil.copy(Path(__file__).with_name("fake_onnxruntime.py"), tmp_path / "onnxruntime.py")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    return tmp_path / "log"


def _block(ep: str, folder: Path, name: str = "m.onnx") -> None:
    (item,) = eps.parse(ep)
    feeds = workers.write_feeds([{"x": X}, {"x": X}], folder, "f")
    with workers.start(item, folder) as process:
        models = [{"path": name, "threads": 0, "feeds": feeds}]
        process.ask("block", models=models, ep=process.request, seconds=0.0, seed="0")


def test_cuda_binds_inputs_and_outputs_and_synchronizes_every_pass(fake: Path, tmp_path: Path) -> None:
    _block("cuda(device=1)", tmp_path)
    lines = fake.read_text().splitlines()
    assert lines[0] == "preload_dlls"
    assert "('CUDAExecutionProvider', {'device_id': '1'}), 'CPUExecutionProvider'" in lines[1]
    assert lines[2:5] == ["value [1, 2, 8, 8] cuda 1", "input x", "output y cuda 1"]
    runs = [line for line in lines if line in ("run", "run-bound", "synchronize")]
    assert len(runs) > 8
    assert runs == ["run-bound", "synchronize"] * (len(runs) // 2)


def test_a_captured_graph_has_one_address_for_every_tensor(fake: Path, tmp_path: Path) -> None:
    _block("cuda(graph=true)", tmp_path)
    lines = fake.read_text().splitlines()
    assert "'enable_cuda_graph': '1'" in lines[1]
    assert "enable_cuda_graph" not in lines[2] and lines[3] == "run", "sizes come from a session without capture"
    assert [line for line in lines if line.startswith(("input", "output"))] == ["input x", "output-value y"]
    assert "value [1, 3] cuda 0" in lines


def test_copies_are_counted_when_asked(fake: Path, tmp_path: Path) -> None:
    _block("cuda(copy=true)", tmp_path)
    assert "run-bound" not in fake.read_text()


def test_nodes_that_stay_on_the_cpu_are_counted(fake: Path, tmp_path: Path) -> None:
    (cuda,) = eps.parse("cuda")
    for name in ("m.onnx", "fallback.onnx"):
        (tmp_path / name).touch()
    found = bench.measure([tmp_path / "m.onnx"], [cuda], {1: [{"x": X}]}, threads=[0], seconds=0.01)
    assert "3 of 5 nodes run on CPUExecutionProvider (2 TopK, 1 NonMaxSuppression)" in found["warnings"][0]
    assert "onnxslim doctor --setup cuda" in found["warnings"][0]
    with pytest.raises(ModelError, match=r"nothing runs on CUDAExecutionProvider, ONNX Runtime fell back to CPU"):
        bench.measure([tmp_path / "fallback.onnx"], [cuda], {1: [{"x": X}]}, seconds=0.01, starts=False)


def test_a_provider_that_refuses_a_file_is_missing_and_the_others_are_measured(fake: Path, tmp_path: Path) -> None:
    (tmp_path / "refused.onnx").touch()
    feeds = {1: [{"x": X}]}
    found = bench.measure([tmp_path / "refused.onnx"], eps.parse("cpu,cuda"), feeds, seconds=0.01, starts=False)
    assert [row["ep"] for row in found["bench"]] == ["cpu"]
    reason = f"{tmp_path / 'refused.onnx'} on cuda: no such option"
    assert found["missing"] == [{"ep": "cuda", "reason": reason, "install": ""}]
    with pytest.raises(ModelError, match=r"refused.onnx on cuda: no such option"):
        bench.measure([tmp_path / "refused.onnx"], eps.parse("cuda"), feeds, seconds=0.01, starts=False)


def test_a_crash_of_the_runtime_names_the_signal(fake: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cuda: its process .* was killed by SIGABRT"):
        _block("cuda", tmp_path, "crash.onnx")


def test_a_plugin_is_registered_and_its_devices_chosen(fake: Path, tmp_path: Path) -> None:
    _block("plugin(library='p.so', hardware=GPU, speed=high)", tmp_path)
    lines = fake.read_text().splitlines()
    assert lines[0] == f"register p {Path('p.so').absolute()}"
    assert lines[1] == "devices ['PluggedExecutionProvider'] {'speed': 'high'}"
    with pytest.raises(ModelError, match="offers no NPU"):
        _block("plugin(library='p.so', hardware=NPU)", tmp_path)
    with pytest.raises(UsageError, match="is registered, but offers no device"):
        _block("plugin(library='deviceless.so')", tmp_path)


def test_batches_repeat_rows_where_the_axis_is_free() -> None:
    feeds = [{"x": np.arange(2)[:, None], "state": np.zeros((4, 1))}]
    (made,) = bench.batched(feeds, {"x": True, "state": False}, 3)
    assert made["x"].ravel().tolist() == [0, 1, 0]
    assert made["state"].shape == (4, 1)
    with pytest.raises(UsageError, match="one batch size only"):
        bench.batched(feeds, {"x": False}, 3)


def test_one_process_measures_every_variant(tiny: Path, tmp_path: Path) -> None:
    feeds = {1: [{"x": X}], 4: [{"x": np.repeat(X, 4, axis=0)}]}
    found = bench.measure([tiny], eps.parse(f"cpu@{sys.executable}"), feeds, threads=[1], seconds=0.05)
    assert [(row["batch"], row["verdict"]) for row in found["bench"]] == [(1, ""), (4, "")]
    one, four = found["bench"]
    assert four["throughput"] == pytest.approx(4e3 / four["latency_ms"]["median"])
    assert one["over_first"]["speedup"] == 1.0
