"""`noise`: error over variance of the worst output."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.noise import noise

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


def test_the_standard_error_is_that_of_drawing_other_samples() -> None:
    """The noise of as many other samples scatters by it."""
    rng = np.random.default_rng(0)

    def samples(count: int) -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
        exact = rng.standard_normal((count, 50)) * rng.lognormal(0, 0.5, (count, 1))
        error = rng.standard_normal((count, 50)) * rng.lognormal(0, 1, (count, 1)) / 10
        return [([x], [x + e]) for x, e in zip(exact, error, strict=True)]

    drawn = [samples(24) for _ in range(300)]
    plain = np.array([noise(pairs) for pairs in drawn])
    doubts = np.array([noise(pairs, 1.0) for pairs in drawn]) - plain
    assert 0.8 * plain.std() < np.sqrt(np.mean(np.square(doubts))) < 1.1 * plain.std()
    alike = [([EXACT], [EXACT + np.float32(0.5)])] * 5
    assert noise(alike, 1.0) == pytest.approx(noise(alike))
    assert noise(alike[:1], 1.0) == noise(alike[:1])
