"""`stages`: parts run one after the other give what the whole gives."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings

import onnxslim
from onnxslim import model as model_io
from onnxslim import runtime, stages

sys.path.insert(0, str(Path(__file__).parent))
from layered import feeds, layered
from strategies import graphs


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(graphs())
def test_parts_together_are_the_whole(case: tuple[onnx.ModelProto, dict[str, np.ndarray]]) -> None:
    proto, feed = case
    model = model_io.load(proto)
    parts = stages.cut(model, 1)
    whole = runtime.load(proto.SerializeToString(), optimize=False)(feed)
    if not parts:
        return
    found = runtime._Staged(model, parts, 1, False)(feed)
    assert list(found) == list(whole)
    for name, value in whole.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


def test_every_part_holds_its_own_weights_only() -> None:
    model = model_io.load(layered())
    parts = stages.cut(model, 20_000)
    sizes = [model_io.weight_bytes(part.model) for part in parts]
    assert len(parts) > 2
    assert max(sizes) < 0.6 * model_io.weight_bytes(model)
    assert sum(sizes) == model_io.weight_bytes(model)
    staged, whole = runtime._Staged(model, parts, 1, True), runtime.load(model)
    np.testing.assert_allclose(staged(feeds()[0])["y"], whole(feeds()[0])["y"], atol=1e-5)


def test_a_run_on_a_large_model_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    made: list[object] = []
    build = runtime._Staged.__init__
    monkeypatch.setattr(runtime._Staged, "__init__", lambda self, *a: (made.append(self), build(self, *a))[1])
    for limit in (runtime.STAGED, 0):
        monkeypatch.setattr(runtime, "STAGED", limit)
        monkeypatch.setattr(runtime, "PART", 20_000 if limit == 0 else runtime.PART)
        assert bool(made) == (len(results) == 2)
        results.append(onnxslim.optimize(layered(), "cluster(bits=4)", calibration=feeds(), bench=False))
    assert made
    errors = [r.report.fidelity["outputs"][0]["relative_l2"] for r in results]  # type: ignore[index]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
