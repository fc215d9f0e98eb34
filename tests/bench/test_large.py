"""bench/large.py: rows, limits and exit codes, on a small model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bench import large


def small(path: Path) -> None:
    builder = large.Builder()
    x = builder.add("Identity", builder.add("MatMul", "x", builder.weight(8, 4)))
    builder.save(path, [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])], x)


CASE = large.Case(small, ("--passes", "simplify", "--no-bench"))


@pytest.mark.parametrize(
    ("limits", "code"), [({}, 0), ({"megabytes": lambda size: size + 1}, 1), ({"options": ("--passes", "nothing")}, 1)]
)
def test_a_case_fails_with_its_command_and_beyond_its_limits(
    limits: dict[str, object], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(large, "CASES", {"small": dataclasses.replace(CASE, **limits)})  # type: ignore[arg-type]
    assert large.main(["small"]) == code
    row = capsys.readouterr().out
    assert row.startswith("small")
    assert ("exit code 2" in row) == ("options" in limits)


def test_models_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    for name, value in {"HIDDEN": 8, "FEED_FORWARD": 16, "VOCABULARY": 11, "BLOCKS": 2}.items():
        monkeypatch.setattr(large, name, value)
    large.decoder(tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    (logits,) = session.run(None, {"tokens": np.arange(16)[None] % 11})
    assert logits.shape == (1, 16, 11)
    assert np.isfinite(logits).all()


def test_resnet50_has_the_layers_of_the_paper(tmp_path: Path) -> None:
    large.resnet50(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert sum(node.op_type == "Conv" for node in model.graph.node) == 53
    weights = sum(int(np.prod(w.dims)) for w in model.graph.initializer)
    assert weights == pytest.approx(25.6e6, rel=0.005)


def test_an_unknown_case_is_bad_usage() -> None:
    with pytest.raises(SystemExit, match="2"):
        large.main(["huge"])
