"""Statistics say nothing about what is not finite, and hold what float32 does not."""

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
