"""Budgets of a metric: what a result may lose, on whose labels, and what is kept when it would lose more."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxslim import runtime
from onnxslim.errors import DataError, UsageError

sys.path.insert(0, str(Path(__file__).parent))

from results_of import answer, kept, optimize

Maker = Callable[..., dict[str, np.ndarray]]

pytestmark = pytest.mark.usefixtures("passes")


def _labelled(model: Any, samples: Maker, count: int = 40) -> dict[str, np.ndarray]:
    """Samples that the model classifies without a fault."""
    arrays = samples(count, seed=2)
    scores = runtime.load(model)({"x": arrays["x"]})["y"]
    return {**arrays, "labels": scores.argmax(1)}


def test_a_budget_that_holds(tiny: Path, samples: Maker) -> None:
    result = optimize(tiny, "scale", calibration=samples(), evaluation=_labelled(tiny, samples), max_drop="60%")
    assert result.exit_code == 0
    metric = result.report.metric
    assert metric is not None
    assert (metric["name"], metric["before"], metric["max_drop"]) == ("top1", 1.0, 0.6)
    assert metric["drop"] == pytest.approx(1 - metric["after"])


def test_a_budget_that_is_missed_keeps_the_best_within_it(tiny: Path, samples: Maker) -> None:
    result = optimize(
        tiny, "scale(by=-3.0),keep(level=2)", calibration=samples(), evaluation=_labelled(tiny, samples), max_drop="1%"
    )
    assert result.exit_code == 1
    assert result.report.warnings[0].startswith("BUDGET MISSED: top1 drops by")
    assert result.report.metric is not None
    assert result.report.metric["after"] == 1.0
    assert result.report.passes[2]["name"] == "keep"
    assert kept(result) == "keep,keep(level=2)"
    assert np.allclose(answer(result.model), answer(tiny), atol=1e-6)


def test_a_budget_binds_the_whole_pipeline(tiny: Path, samples: Maker) -> None:
    """A lossless pass may move the metric too: psnr falls from its ceiling with the first rounding."""
    x = {"x": samples(8)["x"]}
    allowed = optimize(tiny, "lie(by=1.00005)", evaluation=x, metric="psnr", max_drop=50)
    assert (allowed.exit_code, kept(allowed)) == (0, "lie(by=1.00005)")
    result = optimize(tiny, "lie(by=1.00005)", evaluation=x, metric="psnr", max_drop=1)
    assert (result.exit_code, kept(result)) == (1, "")
    assert result.report.metric is not None
    assert result.report.metric["after"] == result.report.metric["before"]


def test_a_missed_budget_does_not_cost_the_other_passes(tiny: Path, samples: Maker) -> None:
    result = optimize(
        tiny,
        "scale(by=-3.0),scale(by=0.999)",
        calibration=samples(),
        evaluation=_labelled(tiny, samples),
        max_drop="20%",
    )
    assert result.exit_code == 1
    assert kept(result) == "keep,scale(by=0.999)"


def test_a_budget_without_labels_is_for_the_cosine(tiny: Path, samples: Maker) -> None:
    x = {"x": samples(8)["x"]}
    assert optimize(tiny, "scale(by=0.999)", calibration=x, max_drop=0.01).exit_code == 0
    result = optimize(tiny, "scale(by=-3.0)", calibration=x, max_drop=0.01)
    assert result.exit_code == 1
    assert result.report.metric is not None
    assert result.report.metric["name"] == "cosine"


def test_a_metric_needs_its_labels(tiny: Path, samples: Maker) -> None:
    for data in ({}, {"evaluation": {"x": samples()["x"]}}):
        with pytest.raises(UsageError, match="has no array 'labels'"):
            optimize(tiny, "scale", metric="top1", **data)


def test_labels_that_do_not_fit_are_left_out_unless_asked_for(tiny: Path, samples: Maker) -> None:
    odd = {"x": samples(8)["x"], "labels": np.full(8, 1000)}
    result = optimize(tiny, evaluation=odd)
    assert result.report.metric is None
    assert any("the labels were not used" in line for line in result.report.warnings)
    nobody = [{"x": samples(1)["x"], "labels": np.zeros(0, np.int64)}] * 2
    assert any("the labels were not used" in line for line in optimize(tiny, evaluation=nobody).report.warnings)
    with pytest.raises(DataError, match="label 1000 with 3 classes"):
        optimize(tiny, evaluation=odd, metric="top1")
