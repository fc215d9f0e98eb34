"""What the user writes about execution providers, and environments for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onnxslim import eps
from onnxslim.errors import UsageError


def test_names_options_and_interpreters() -> None:
    text = f"cpu(affinity=[0, 1], spin=true),openvino(device='GPU.0', cache='a b,c')@{sys.executable}, cuda"
    cpu, openvino, cuda = eps.parse(text)
    assert cpu.request() == {
        "provider": "CPUExecutionProvider", "config": {}, "affinity": [0, 1], "options": {},
    }  # fmt: skip
    assert openvino.python == sys.executable
    assert openvino.request()["options"] == {"device_type": "GPU.0", "cache_dir": str(Path("a b,c").absolute())}
    assert openvino.pythons() == [sys.executable]
    assert cuda.request()["bind"] == "cuda"
    assert [ep.label for ep in (cpu, cuda)] == ["cpu(affinity=[0, 1], spin=true)", "cuda"]


def test_an_interpreter_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("python").symlink_to(sys.executable)
    (ep,) = eps.parse("cpu@python")
    assert ep.python == str(tmp_path / "python")


def test_idle_threads_do_not_spin_unless_asked() -> None:
    (quiet,), (spinning,) = eps.parse("cpu"), eps.parse("cpu(spin=true)")
    assert quiet.request()["config"]["session.force_spinning_stop"] == "1"
    assert not spinning.request()["config"]


def test_cuda_graph_copies_and_devices() -> None:
    (graph,), (copies,) = eps.parse("cuda(graph=true, device=1)"), eps.parse("cuda(copy=true)")
    assert graph.request()["graph"] and graph.request()["options"] == {"device_id": "1"}
    assert copies.request()["bind"] is None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("tpu", "unknown execution provider 'tpu': give one of cpu, cuda, openvino, plugin"),
        ("", "is not NAME"),
        ("cpu,,cuda", "is not NAME"),
        ("cpu@/no/such/python", "no interpreter /no/such/python"),
        ("cpu(threads=2)", "unknown option 'threads'"),
        ("cpu(1)", "name=value"),
        ("cpu(a=b=c)", "name=value"),
        ("cpu,cpu", "given twice"),
        ("cuda(graph=true, copy=true)", "nothing to count"),
        ("plugin", "package=MODULE or library=FILE"),
    ],
)
def test_bad_texts(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        eps.parse(text)


def test_environments_lie_in_the_cache_and_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        eps.interpreter("openvino").parent.mkdir(parents=True, exist_ok=True)
        eps.interpreter("openvino").touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    python = eps.prepare("openvino")
    assert tmp_path in python.parents
    assert calls[1][-2:] == ["numpy", "onnxruntime-openvino"]
    assert str(python) in calls[1]
    assert eps.Ep("openvino").pythons() == [sys.executable, str(python)]


def test_an_environment_that_cannot_be_made_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no environment can be made for 'tpu'"):
        eps.prepare("tpu")
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no such package\nmore")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UsageError, match="ERROR: no such package"):
        eps.prepare("cuda")
