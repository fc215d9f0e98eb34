"""bench/timing.py: the slower file is slower by exactly what it says, and runs are counted right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

# bench/ and models/ are no installed packages: they are imported from the checkout, as the command line does.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import timing
from onnxslim import cost, runtime
from onnxslim import model as model_io

X = np.random.default_rng(0).standard_normal((1, 2, 8, 8)).astype(np.float32)


def test_copies_do_the_work_of_as_many_networks(tiny: Path) -> None:
    ten, eleven = (model_io.load(timing.copies(tiny, count)) for count in (10, 11))
    assert cost.analyze(eleven).macs / cost.analyze(ten).macs == pytest.approx(1.1)
    single, all_of_them = runtime.load(tiny), runtime.load(ten)({"x": X})
    assert len(all_of_them) == 10
    for k, output in enumerate(all_of_them.values()):
        assert np.allclose(output, single({"x": X * np.float32(1 + k / 1024)})["y"], atol=1e-5)
    kernels = [node.op_type for node in runtime.optimized(ten).graph]
    assert sum("Conv" in op for op in kernels) == 10, "the runtime has not merged the copies"


def test_a_run_counts_what_the_rows_say() -> None:
    def rows(interval: tuple[float, float], verdict: str) -> list[dict[str, object]]:
        again = {"interval": interval, "disturbed": 0.1, "waited": 0.0}
        return [{}, again, {"verdict": verdict, "speedup": 0.9}]

    row = timing.Row("net", 1, "idle")
    for interval, verdict in (((0.9, 1.1), "slower"), ((1.01, 1.1), "slower"), ((0.9, 0.99), "same within noise")):
        row.add(rows(interval, verdict))
    assert (row.runs, row.same, row.slower) == (3, 1, 2)
    assert row.ratios[0] == pytest.approx(1 / 0.9)


def test_one_command_runs_several_cases(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    timing.main(["--runs", "1", "--seconds", "0.01", "--other", "idle", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    cases = [(row["threads"], row["other_core"]) for row in rows]
    assert cases == [(1, "idle"), (2, "idle")] and all(row["runs"] == 1 for row in rows)
    assert capsys.readouterr().out.count("small ") == 2


def test_the_busy_process_ends() -> None:
    with timing.busy(True):
        pass
    with timing.busy(False):
        pass


def test_a_model_that_is_not_at_hand_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing.zoo.Model, "path", Path("nowhere.onnx"))
    assert timing.main(["fmnist_cnn"]) == 2
    assert "models/zoo.py fetch fmnist_cnn" in capsys.readouterr().err
