"""`custom_ops`: every session registers the libraries, here and in workers.

No library is built here: what ONNX Runtime is asked to register is recorded instead.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxslim
from onnxslim import cli, custom_ops, eps, runtime, worker, workers
from onnxslim.errors import UsageError

BATCHES = [{"x": np.random.default_rng(k).standard_normal((1, 2, 8, 8)).astype(np.float32)} for k in range(4)]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    path = tmp_path / "ops.so"
    path.write_bytes(b"no library at all")
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Every registration: which of the session options, counted in the order they were made, and the path."""
    found: list[tuple[int, str]] = []
    made = []

    class Recorded(runtime.ort.SessionOptions):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            made.append(self)
            self.number = len(made)

        def register_custom_ops_library(self, path: str) -> None:
            found.append((self.number, path))

    monkeypatch.setattr(runtime.ort, "SessionOptions", Recorded)
    found.clear()
    monkeypatch.setattr(custom_ops, "made", made, raising=False)
    return found


def test_every_session_of_a_run_registers_them(
    proto: onnx.ModelProto, library: Path, asked: list[tuple[int, str]]
) -> None:
    passes = "fold,fp16"
    result = onnxslim.optimize(proto, passes, calibration=BATCHES, bench=False, custom_ops=[library])
    sessions = custom_ops.made  # type: ignore[attr-defined]
    assert len(sessions) > 2
    assert asked == [(k + 1, str(library)) for k in range(len(sessions))]
    assert result.report.environment["custom_ops"] == [str(library)]
    before = len(asked)
    plain = onnxslim.optimize(proto, passes, calibration=BATCHES, bench=False)
    assert len(asked) == before
    assert "custom_ops" not in plain.report.environment


def test_workers_register_them(library: Path, tmp_path: Path, asked: list[tuple[int, str]]) -> None:
    with custom_ops.using([library]), workers.start(eps.Ep("cpu"), tmp_path) as process:
        assert process.request["custom_ops"] == [str(library)]
    worker.session_arguments(runtime.ort, {"provider": "CPUExecutionProvider", "custom_ops": ["a", "b"]}, 1)
    assert [path for _, path in asked] == ["a", "b"]


@pytest.mark.parametrize("command", [[], ["inspect"], ["compare"], ["bench"]])
def test_a_library_that_is_not_there(tiny: Path, tmp_path: Path, command: list[str]) -> None:
    models = [str(tiny)] if command == ["inspect"] else [str(tiny), str(tmp_path / "out.onnx")]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, *models, "--custom-ops", str(tmp_path / "none.so")])
    assert stopped.value.code == 2


def test_a_file_that_is_no_library(tiny: Path, library: Path) -> None:
    with custom_ops.using([library]), pytest.raises(UsageError, match=r"ops\.so: ONNX Runtime cannot register it"):
        runtime.load(tiny)
    assert custom_ops.libraries() == ()
    runtime.load(tiny)
