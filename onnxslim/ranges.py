"""Candidate ranges of activations for 8-bit storage, from one histogram per tensor.

The expected squared error of a range [a, b] stored in 256 levels of width d = (b - a) / 255 is

    E(a, b) = P(a <= x <= b, x != 0) d^2 / 12  +  E[(a - x)^2; x < a]  +  E[(x - b)^2; x > b],

the first term being the rounding error of values spread over many levels; exact zeros cost nothing.
"""

from __future__ import annotations

import numpy as np

from onnxslim.calibration import Histogram
from onnxslim.responses import Function

SHARES = {"p99.99": 0.9999, "p99.9": 0.999}


def expected_error(histogram: Histogram, low: float, high: float, function: Function | None = None) -> float:
    """Mean squared error of storing the tensor in 256 levels over [low, high] (zero included).

    With ``function`` (see `onnxslim.responses`), the error of its result.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    x, mass = histogram.centers, histogram.counts
    total = max(histogram.total, 1)
    if function is not None:
        used = mass > 0
        x, mass = x[used], mass[used] / total
        # Several points per bin: a bin may be wider than the step.
        x = x[:, None] + np.array([-0.375, -0.125, 0.125, 0.375]) * (2 * histogram.limit / histogram.BINS)
        step = max((high - low) / 255, 1e-30)
        zero = round(-low / step)
        stored = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
        return float((mass * np.square(function(stored) - function(x)).mean(1)).sum())
    outside = np.maximum(low - x, 0.0) + np.maximum(x - high, 0.0)
    inside = mass[outside == 0].sum()
    clipped = (mass * np.square(outside)).sum()
    return float((inside * ((high - low) / 255) ** 2 / 12 + clipped) / total)


def least_error(histogram: Histogram, function: Function | None = None, steps: int = 24) -> tuple[float, float]:
    """The range within the extremes with the least `expected_error`, by shrinking each end in turn on a log scale."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    factors = np.geomspace(1.0, 0.02, steps)

    def error(low: float, high: float) -> float:
        return expected_error(histogram, low, high, function)

    for _ in range(2):
        if high > 0:
            top = max(histogram.high, 0.0)
            high = top * min(factors, key=lambda f: error(low, top * f))
        if low < 0:
            bottom = histogram.low
            low = bottom * min(factors, key=lambda f: error(bottom * f, high))
    return low, high


def candidates(histogram: Histogram, function: Function | None = None) -> dict[str, tuple[float, float]]:
    """Ranges to choose from, by name; the first is the whole range. Empty when nothing finite was seen."""
    if not np.isfinite(histogram.low):
        return {}
    found = {"minmax": (min(histogram.low, 0.0), max(histogram.high, 0.0))}
    if histogram.limit == 0:
        return found
    for name, share in SHARES.items():
        low, high = histogram.quantile(share)
        found[name] = (min(low, 0.0), max(high, 0.0))
    found["mse"] = least_error(histogram, function)
    return found
