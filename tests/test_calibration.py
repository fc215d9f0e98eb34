"""Statistics against numpy in float64: they say nothing about what is not finite, and hold what float32 does not."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration import Moments


def test_rows_that_are_not_finite_are_left_out() -> None:
    rng = np.random.default_rng(0)
    z, x = (rng.standard_normal((20, n)).astype(np.float32) for n in (3, 2))
    clean, given = Moments(), Moments()
    clean.add(z, x)
    bad_z, bad_x = z[:3].copy(), x[:3].copy()
    bad_z[0, 1], bad_z[1, 0], bad_x[2, 1] = np.nan, -np.inf, np.inf
    given.add(bad_z, bad_x)
    assert given.empty
    given.add(z, x)
    assert not given.empty
    assert given.count == 20
    assert given.second().shape == (3, 3)
    for name in ("zz", "xz"):
        np.testing.assert_allclose(given.second(name), clean.second(name), rtol=1e-6)
    np.testing.assert_allclose(given.mean("x"), clean.mean("x"), rtol=1e-6)


def test_squares_beyond_float32_are_held() -> None:
    moments = Moments()
    moments.add(np.full((4, 2), 1e30, np.float32))
    assert moments.second() == pytest.approx(np.full((2, 2), 1e60))


def rows(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((count, 7)) * 0.01 + np.linspace(-500, 500, 7)).astype(np.float32)
    return z, (z @ np.random.default_rng(9).standard_normal((7, 3)) + 5).astype(np.float32)


@pytest.mark.parametrize("piece", [1, 700, 5000, 9000])
def test_moments_of_pieces_are_those_of_the_whole(piece: int) -> None:
    z, x = rows(0, 9000)
    found = Moments()
    for start in range(0, len(z), piece):
        found.add(z[start : start + piece], x[start : start + piece])
    wide, tall = z.astype(np.float64), x.astype(np.float64)
    np.testing.assert_allclose(found.mean(), wide.mean(0), rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(found.mean("x"), tall.mean(0), rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(found.covariance(), np.cov(wide.T, bias=True), rtol=1e-3, atol=1e-8)
    both = (tall - tall.mean(0)).T @ (wide - wide.mean(0)) / len(wide)
    np.testing.assert_allclose(found.covariance("xz"), both, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found.second(), wide.T @ wide / len(wide), rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(found.second("xz"), tall.T @ wide / len(wide), rtol=1e-8, atol=1e-6)
    assert np.linalg.eigvalsh(found.covariance()).min() > 0
