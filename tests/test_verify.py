"""Fidelity: equal models pass, wrong ones fail whatever the type of the output, and noise is told from error."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxslim import model as model_io
from onnxslim import runtime, verify
from onnxslim.data import Data, InputSpec

SPEC = (InputSpec("x", np.dtype(np.float32), (None, None)),)


class _Fixed(runtime.Runner):
    """Answers sample k with the k-th of the given outputs."""

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.answers = answers
        self.inputs = ["x"]
        self.outputs = list(answers[0])

    def __call__(self, feeds: Any) -> dict[str, Any]:
        return self.answers[int(feeds["x"][0, 0])]


def _data(count: int) -> Data:
    return Data("numbers", count, lambda k: {"x": np.full((1, 1), k, np.float32)}, SPEC)


class _Counting(_Fixed):
    """Counts its passes."""

    count = 0

    def __call__(self, feeds: Any) -> dict[str, Any]:
        self.count += 1
        return super().__call__(feeds)


def test_a_sample_that_comes_again_is_answered_from_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [{"y": np.full(4, k, np.float32)} for k in range(3)]
    data = _data(3)
    for bytes_kept, passes in ((1000, 3), (40, 6)):
        monkeypatch.setattr(verify, "_CACHE", bytes_kept)
        runner = _Counting(answers)
        remembering = verify.Remembering(runner)
        for _ in range(2):
            for k, feed in enumerate(data.feeds()):
                assert np.array_equal(remembering(feed)["y"], answers[k]["y"])
        assert runner.count == passes


def _measure(want: list[Any], got: list[Any], **options: Any) -> verify.Fidelity:
    reference = verify.Reference(_Fixed([{"y": v} for v in want]), _data(len(want)))
    return verify.measure(reference, _Fixed([{"y": v} for v in got]), **options)[0]


RNG = np.random.default_rng(0)
WANT = [RNG.standard_normal((2, 5)).astype(np.float32) for _ in range(4)]


def test_equal_outputs_are_equal() -> None:
    fidelity = _measure(WANT, WANT)
    (output,) = fidelity.outputs
    assert (output.relative_l2, output.max_abs, output.top1_agreement) == (0, 0, 1)
    assert output.cosine == pytest.approx(1)
    assert fidelity.broken() is None
    assert fidelity.warnings() == []
    assert fidelity.samples == 4


@pytest.mark.parametrize(
    ("dtype", "small", "large"),
    [("float32", 1e-6, 1e-2), ("float64", 1e-9, 1e-4), ("float16", 1e-3, 5e-2), ("bfloat16", 1e-2, 0.2)],
)
def test_tolerance_follows_the_type(dtype: str, small: float, large: float) -> None:
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    want = [w.astype(kind) for w in WANT]
    assert _measure(want, [(w * (1 + small)).astype(kind) for w in WANT]).broken() is None
    assert "relative error" in (_measure(want, [(w * (1 + large)).astype(kind) for w in WANT]).broken() or "")


def test_a_wrong_weight_of_one_percent_fails() -> None:
    assert _measure(WANT, [w * np.float32(1.01) for w in WANT]).broken() is not None


def test_one_wrong_element_among_many_fails() -> None:
    want = [np.ones((1, 10_000_000), np.float32)]
    got = [want[0].copy()]
    got[0][0, 77] = 1.2
    fidelity = _measure(want, got)
    assert fidelity.relative_l2 < 1e-4
    assert fidelity.broken() is not None


@given(
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)),
    hnp.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)),
)
def test_figures_against_their_definitions(a: np.ndarray, b: np.ndarray) -> None:
    (output,) = _measure([a[:1], a[1:]], [b[:1], b[1:]]).outputs
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    norm = np.linalg.norm(wide_a)
    assert output.relative_l2 == pytest.approx(np.linalg.norm(wide_b - wide_a) / (norm or 1))
    assert output.max_abs == pytest.approx(np.abs(wide_b - wide_a).max())
    assert output.max_rel == pytest.approx(np.abs(wide_b - wide_a).max() / (np.abs(wide_a).max() or 1))
    assert output.top1_agreement == np.mean(a.argmax(1) == b.argmax(1))
    if norm > 1e-6 and np.linalg.norm(wide_b) > 1e-6:
        assert output.cosine == pytest.approx(np.vdot(wide_a, wide_b) / norm / np.linalg.norm(wide_b))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_new_nan_fails_and_is_warned_of(bad: float) -> None:
    got = [w.copy() for w in WANT]
    got[2][1, 3] = bad
    fidelity = _measure(WANT, got)
    assert "1 values are NaN or infinite in one model only" in (fidelity.broken() or "")
    assert fidelity.warnings()
    assert _measure(got, got).broken() is None, "both have it"


def test_the_sign_of_infinity_counts() -> None:
    plus, minus = [np.array([[np.inf, 1]], np.float32)], [np.array([[-np.inf, 1]], np.float32)]
    assert _measure(plus, minus).broken() is not None


@pytest.mark.parametrize("dtype", [bool, object])
def test_truth_values_and_texts_that_differ_are_an_error(dtype: Any) -> None:
    want = np.array([0, 1, 1, 0, 1]).astype(dtype)
    answers = [{"y": want}, {"y": want[::-1]}]
    reference = verify.Reference(_Fixed(answers), _data(2))
    for other, share in (({"y": want}, 0.4), ({"y": np.array([1, 0, 0, 1, 0]).astype(dtype)}, 0.6)):
        fidelity, _ = verify.measure(reference, _Fixed([other] * 2))
        assert fidelity.relative_l2 == pytest.approx(share)
        assert fidelity.outputs[0].cosine == pytest.approx(1 - share)
    assert verify.measure(reference, _Fixed(answers))[0].relative_l2 == 0


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, bool, object])
def test_integers_booleans_and_texts_must_be_equal(dtype: Any) -> None:
    want = [np.array([[0, 1, 2, 3]]).astype(dtype)]
    got = [want[0].copy()]
    assert _measure(want, got).broken() is None
    got[0][0, 1] = np.array(0).astype(dtype)
    assert "1" in (_measure(want, got).broken() or "")


@pytest.mark.parametrize(
    "got", [np.zeros((2, 4), np.float32), np.zeros((2, 5), np.float64), np.zeros((1, 2, 5), np.float32)]
)
def test_another_shape_or_type_fails(got: np.ndarray) -> None:
    fidelity = _measure(WANT[:1], [got])
    assert " float32" in (fidelity.broken(lambda: pytest.fail("noise is no excuse")) or "")


def test_a_missing_output_fails() -> None:
    reference = verify.Reference(_Fixed([{"y": WANT[0], "z": WANT[0]}]), _data(1))
    fidelity, _ = verify.measure(reference, _Fixed([{"y": WANT[0]}]))
    assert fidelity.broken() == "output 'z': is missing"
    assert fidelity.warnings()


def test_sequences_and_maps_are_compared_element_by_element() -> None:
    want = [[WANT[0], {"a": WANT[1]}, None]]
    assert [o.output for o in _measure(want, want).outputs] == ["y[0]", "y[1][a]"]
    assert _measure(want, [[WANT[0], {"a": WANT[1] * 2}]]).broken() is not None
    assert _measure(want, [[WANT[0]]]).broken() == "output 'y[1][a]': is missing"
    assert _measure([[]], [[]]).broken() is None


def test_a_result_that_ignores_its_input_has_collapsed() -> None:
    fidelity = _measure(WANT, [WANT[0]] * 4)
    assert "collapsed" in fidelity.warnings()[0]
    assert _measure([WANT[0]] * 4, [WANT[0]] * 4).warnings() == [], "so did the original"


def test_noise_of_the_original_excuses_what_is_not_worse() -> None:
    def noise(size: float) -> verify.Fidelity:
        return _measure(WANT, [w * np.float32(1 + size) for w in WANT])

    candidate = noise(1e-3)
    assert candidate.broken() is not None
    assert candidate.broken(lambda: noise(1e-5)) is not None
    assert candidate.broken(lambda: noise(1e-3)) is None
    nan = [np.full_like(w, np.nan) for w in WANT]
    assert _measure(WANT, nan).broken(lambda: noise(1e-3)) is not None


def test_the_reference_runs_once_for_several_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _Fixed([{"y": w} for w in WANT])
    calls: list[Any] = []
    original = runner.__class__.__call__
    monkeypatch.setattr(_Fixed, "__call__", lambda self, feeds: (calls.append(self), original(self, feeds))[1])
    reference = verify.Reference(runner, _data(4))
    for _ in range(3):
        verify.measure(reference, _Fixed([{"y": w} for w in WANT]))
    assert sum(c is runner for c in calls) == 4
    monkeypatch.setattr(verify, "_CACHE", 0)
    uncached = verify.Reference(runner, _data(4))
    calls.clear()
    for _ in range(2):
        verify.measure(uncached, _Fixed([{"y": w} for w in WANT]))
    assert sum(c is runner for c in calls) == 8


def test_real_sessions(proto: onnx.ModelProto) -> None:
    model = model_io.load(proto)
    rng = np.random.default_rng(0)
    rows = [{"x": rng.standard_normal((1, 2, 8, 8)).astype(np.float32)} for _ in range(3)]
    data = Data("rows", 3, rows.__getitem__, (InputSpec("x", np.dtype(np.float32), (None, 2, 8, 8)),))
    reference = verify.Reference(runtime.load(model), data)
    assert verify.measure(reference, runtime.load(model, optimize=False))[0].broken() is None


def test_what_is_infinite_in_both_is_no_proof() -> None:
    """An output without a finite value agrees with anything that overflows as it does."""
    nan = [np.full_like(w, np.nan) for w in WANT]
    fidelity = _measure(nan, nan)
    (output,) = fidelity.outputs
    assert fidelity.broken() is None
    assert output.blind
    assert np.isnan(output.relative_l2) and np.isnan(output.cosine) and np.isnan(fidelity.relative_l2)
    assert output.top1_agreement is None
    (line,) = fidelity.warnings()
    assert "nothing can be said" in line
    infinite = [np.full_like(w, -np.inf) for w in WANT]
    assert _measure(nan, infinite).broken() is not None


def test_errors_are_of_the_finite_values_and_say_so() -> None:
    want = [np.array([[1, 2, np.inf, np.nan]], np.float32)]
    got = [np.array([[1, 2.2, np.inf, np.nan]], np.float32)]
    fidelity = _measure(want, got)
    (output,) = fidelity.outputs
    assert output.relative_l2 == pytest.approx(0.2 / np.sqrt(5), rel=1e-3)
    assert (output.elements, output.unjudged, output.nonfinite) == (4, 2, 0)
    assert fidelity.warnings() == []
    assert fidelity.notes() == [
        "output 'y': 2 of 4 values are NaN or infinite in the original; errors are of the others"
    ]
    assert _measure(WANT, WANT).notes() == []
