"""Metrics and budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim import metrics
from onnxslim.errors import DataError, UsageError

SCORES = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], np.float32)


def _top1(scores: Any, labels: Any) -> float:
    return metrics.find("top1")({"y": np.asarray(scores)}, {"labels": np.asarray(labels)}, {})


def test_top1_counts_rows() -> None:
    assert _top1(SCORES, [1, 0, 2]) == 1
    assert _top1(SCORES, [1, 1, 1]) == pytest.approx(1 / 3)
    assert _top1(SCORES[:1], np.int64(1)) == 1


def test_several_right_classes_are_padded_with_minus_one() -> None:
    assert _top1(SCORES, [[0, 1], [2, -1], [-1, -1]]) == pytest.approx(1 / 3)


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_top1_takes_labels_where_there_are_no_scores(shape: tuple[int, ...]) -> None:
    ids = np.array([1, 0, 1], np.int64).reshape(shape)
    outputs = {"features": np.ones((1, 4), np.float32), "label": ids}
    sample = {"labels": np.array([1, 0, 2])}
    assert metrics.find("top1")(outputs, sample, {}) == pytest.approx(2 / 3)
    assert metrics.find("top1")(outputs | {"y": np.asarray(SCORES)}, sample, {}) == 1
    with pytest.raises(DataError, match="top5: no output holds"):
        metrics.find("top5")(outputs, sample, {})


def test_top5_contains_top1() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.random((50, 20)), rng.integers(0, 20, 50)
    five = metrics.find("top5")({"y": scores}, {"labels": labels}, {})
    best = np.argsort(-scores, axis=1)[:, :5]
    assert five == np.mean([label in row for label, row in zip(labels, best, strict=True)])
    assert five >= _top1(scores, labels)


def test_nan_is_never_right() -> None:
    bad = SCORES.copy()
    bad[0, 1] = np.nan
    assert _top1(bad, [1, 0, 2]) == pytest.approx(2 / 3)


def test_class_maps_of_one_pixel_are_scores() -> None:
    assert _top1(SCORES[:, :, None, None], [1, 0, 2]) == 1


def test_the_first_output_with_a_row_per_label_is_used() -> None:
    outputs = {"boxes": np.zeros((7, 4), np.float32), "ids": np.array([1, 0, 2]), "y": SCORES}
    assert metrics.find("top1")(outputs, {"labels": np.array([1, 0, 2])}, {}) == 1


@pytest.mark.parametrize(
    ("outputs", "sample", "message"),
    [
        ({"y": SCORES}, {}, "no array 'labels'"),
        ({"y": SCORES}, {"labels": np.array([1, 0, 9])}, "label 9 with 3 classes"),
        ({"y": SCORES}, {"labels": np.array([1, 0])}, "one row of class scores for each of 2 labels"),
        ({"y": SCORES[:, :1]}, {"labels": np.array([0, 0, 0])}, "no output holds"),
    ],
)
def test_labels_that_do_not_fit_are_data_errors(outputs: Any, sample: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.find("top1")(outputs, sample, {})


def test_cosine_and_psnr_against_the_original_or_a_target() -> None:
    want = {"y": SCORES, "ids": np.array([1, 2])}
    for name, best in (("cosine", 1.0), ("psnr", metrics.PSNR_CEILING)):
        metric = metrics.find(name)
        assert metric(want, {}, want) == pytest.approx(best)
        noisy = {"y": SCORES + np.float32(0.1) * np.sign(SCORES - 0.3)}
        assert metric(noisy, {}, want) < metric({"y": SCORES + np.float32(1e-3)}, {}, want) < best
        assert metric(noisy, {"y": noisy["y"]}, want) == pytest.approx(best), "the sample's own target comes first"
    half = {"y": SCORES + np.float32(0.06)}
    peak = SCORES.max() - SCORES.min()
    assert metrics.find("psnr")(half, {}, want) == pytest.approx(20 * np.log10(peak / 0.06), rel=1e-3)


@pytest.mark.parametrize("name, best, worst", [("cosine", 1.0, 0.0), ("psnr", metrics.PSNR_CEILING, None)])
def test_of_what_is_not_finite_in_the_original_nothing_is_said(name: str, best: float, worst: float | None) -> None:
    metric = metrics.find(name)
    masked = {"y": np.where(SCORES.mean() < SCORES, SCORES, -np.inf)}
    assert metric(masked, {}, masked) == pytest.approx(best)
    broken = metric({"y": np.full_like(SCORES, np.nan)}, {}, masked)
    assert broken == (-metrics.PSNR_CEILING if worst is None else worst)
    nothing = {"y": np.full_like(SCORES, np.nan)}
    assert metric(nothing, {}, nothing) == pytest.approx(best)


def test_metrics_of_outputs_that_cannot_be_compared_are_data_errors() -> None:
    with pytest.raises(DataError, match="floating-point"):
        metrics.find("cosine")({"y": np.array([1])}, {}, {"y": np.array([1])})
    with pytest.raises(DataError, match="shape"):
        metrics.find("psnr")({"y": SCORES}, {}, {"y": SCORES[:1]})


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_metric.py").write_text(
        "def score(outputs, sample):\n    return outputs['y'].sum() + sample['x']\n"
        "def bad(outputs, sample):\n    return {}[1]\n"
    )
    assert metrics.find("my_metric:score")({"y": np.ones(3)}, {"x": np.float32(2)}, {}) == 5
    with pytest.raises(UsageError, match=r"my_metric:bad: KeyError: 1"):
        metrics.find("my_metric:bad")({}, {}, {})


@pytest.mark.parametrize("name", ["top2", "accuracy", "no_module_of_this_name:f", ""])
def test_unknown_metrics_are_usage_errors(name: str) -> None:
    with pytest.raises(UsageError):
        metrics.find(name)


def test_percent_are_points() -> None:
    assert metrics.allowed_drop("1%", 0.93) == pytest.approx(0.01)
    assert metrics.allowed_drop("1 %", 93.0) == 1
    assert metrics.allowed_drop("0.01", 93.0) == 0.01
    assert metrics.allowed_drop(0.5, 0.9) == 0.5
    assert metrics.allowed_drop("2%", metrics.PSNR_CEILING) == 2


@given(st.floats(0, 100))
def test_a_number_is_itself(value: float) -> None:
    assert metrics.parse_drop(value) == metrics.parse_drop(str(value)) == (value, False)
    assert metrics.parse_drop(f"{value}%") == (value, True)


@pytest.mark.parametrize("text", ["", "%", "one", "-1%", "-0.1", "nan", "inf", "1%%"])
def test_malformed_budgets_are_usage_errors(text: str) -> None:
    with pytest.raises(UsageError, match="max drop"):
        metrics.parse_drop(text)


def test_class_labels_suggest_top1() -> None:
    labelled = {"x": SCORES, "labels": np.array([1])}
    suggested = metrics.suggested(labelled, ["x"])
    assert suggested is not None
    assert suggested.name == "top1"
    assert metrics.suggested({"x": SCORES}, ["x"]) is None
    assert metrics.suggested(labelled, ["x", "labels"]) is None, "labels are an input of this model"
    assert metrics.suggested({"labels": np.array([0.5])}, ["x"]) is None
