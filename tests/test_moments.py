"""`calibration.Moments` against numpy in float64, where float32 alone would lose the variance."""

from __future__ import annotations

import numpy as np
import pytest

from onnxslim.calibration import Moments


def rows(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = (rng.standard_normal((count, 7)) * 0.01 + np.linspace(-500, 500, 7)).astype(np.float32)
    return z, (z @ np.random.default_rng(9).standard_normal((7, 3)) + 5).astype(np.float32)


def seen(z: np.ndarray, x: np.ndarray) -> Moments:
    result = Moments()
    for start in range(0, len(z), 700):
        result.add(z[start : start + 700], x[start : start + 700])
    return result


@pytest.mark.parametrize("cut", [0, 100, 3000, 9000])
def test_moments_of_parts_are_those_of_the_whole(cut: int) -> None:
    z, x = rows(0, 9000)
    found = seen(z[:cut], x[:cut]).joined(seen(z[cut:], x[cut:]))
    wide, tall = z.astype(np.float64), x.astype(np.float64)
    np.testing.assert_allclose(found.mean(), wide.mean(0), rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(found.mean("x"), tall.mean(0), rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(found.covariance(), np.cov(wide.T, bias=True), rtol=1e-3, atol=1e-8)
    both = (tall - tall.mean(0)).T @ (wide - wide.mean(0)) / len(wide)
    np.testing.assert_allclose(found.covariance("xz"), both, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(found.second(), wide.T @ wide / len(wide), rtol=1e-8, atol=1e-6)
    np.testing.assert_allclose(found.second("xz"), tall.T @ wide / len(wide), rtol=1e-8, atol=1e-6)
    assert np.linalg.eigvalsh(found.covariance()).min() > 0
