"""`probe.noise`: error over variance, and nothing said where nothing can be."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.probe import noise

EXACT = np.array([1.0, 2.0, 3.0, 4.0], np.float32)


def test_error_over_variance_of_the_worst_output() -> None:
    other = EXACT + np.float32(0.5)
    assert noise([([EXACT, EXACT], [EXACT, other])]) == pytest.approx(4 * 0.25 / 5)
    assert noise([([EXACT], [EXACT])]) == 0
    assert noise([([np.array([1, 2])], [np.array([3, 4])])]) == 0  # integers are for others to judge


def test_what_is_not_finite_is_no_proof() -> None:
    nan = np.full(4, np.nan, np.float32)
    assert noise([([nan], [nan])]) == np.inf
    assert noise([([nan, EXACT], [nan, EXACT])]) == 0
    assert noise([([EXACT], [nan])]) == np.inf


def test_arrays_of_a_sequence_may_be_more_in_one_sample_than_in_another() -> None:
    other = EXACT + np.float32(0.5)
    assert noise([([EXACT], [EXACT]), ([EXACT, EXACT], [EXACT, other])]) == pytest.approx(4 * 0.25 / 5)
    assert noise([([EXACT, EXACT], [EXACT])]) == np.inf


def test_a_float_output_of_another_shape_is_lost() -> None:
    assert noise([([EXACT], [EXACT[:2]])]) == np.inf
    assert noise([([EXACT, np.arange(3)], [EXACT, np.arange(2)])]) == 0


def test_an_output_that_does_not_vary_may_differ_by_rounding() -> None:
    exact = np.full((4, 1), -5.7711415, np.float32)
    assert noise([([exact], [np.nextafter(exact, np.float32(0))])]) < 1e-3
    assert noise([([exact], [exact * np.float32(1.0001)])]) > 0.02
