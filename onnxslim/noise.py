"""How much of its outputs a change costs a model: squared error over the variance of the exact result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Rounding of an output: so many units in the last place of its numbers.
ROUNDING = 64

Outputs = Sequence[np.ndarray]


class Gap(NamedTuple):
    """One output of one sample: squared error, and squared deviation of the exact result.

    ``told`` where the exact result has finite numbers; errors elsewhere cannot be seen.
    """

    error: float
    signal: float
    told: bool


def noise(pairs: Sequence[tuple[Outputs, Outputs]], doubt: float = 0.0) -> float:
    """`share` of the gaps between ``pairs`` of (exact outputs, other outputs), one of each sample."""
    return share([gaps(exact, other) for exact, other in pairs], doubt)


def gaps(exact: Outputs, other: Outputs) -> list[Gap | None]:
    """The gap of each output; None for those that are not floating-point or empty.

    Sequences may give more arrays for one sample than for another; an array of another shape is lost altogether.
    """
    if _shapes(exact) != _shapes(other):
        return [Gap(np.inf, 0.0, True)]
    return [_gap(a, b) if a.dtype.kind == "f" and a.size else None for a, b in zip(exact, other, strict=False)]


def share(samples: Sequence[Sequence[Gap | None]], doubt: float = 0.0) -> float:
    """Squared error over the variance of the exact result, for the worst floating-point output; 0 is perfect.

    Errors and variances are summed over the samples. Infinity where nothing can be told: where all that is exact is NaN
    or infinite. ``doubt`` standard errors are added: what other samples of the same kind may show (of a ratio of sums;
    Cochran: Sampling Techniques, 6.4).
    """
    worst = 0.0
    for index in range(max(map(len, samples))):
        found = [gap for sample in samples if index < len(sample) and (gap := sample[index]) is not None]
        errors, signals = [gap.error for gap in found], [gap.signal for gap in found]
        error, signal = sum(errors), max(sum(signals), 1e-12)
        if not np.isfinite(error):
            return np.inf
        if error:
            spread = np.subtract(errors, np.multiply(error / signal, signals))
            deviation = float(np.sqrt(np.square(spread).sum() * len(spread) / max(len(spread) - 1, 1)))
            worst = max(worst, (error + doubt * deviation) / signal)
    every = [gap for sample in samples for gap in sample if gap is not None]
    return worst if not every or any(gap.told for gap in every) else np.inf


def _gap(exact: np.ndarray, other: np.ndarray) -> Gap:
    """Against the variance, so that a constant offset of an output does not hide errors."""
    kept = np.isfinite(exact)
    x = exact[kept].astype(np.float64)
    spread = float(np.square(x - x.mean()).sum() if x.size > 1 else np.square(x).sum())
    # An output that does not vary differs by what rounding its numbers does.
    signal = max(spread, float(np.square(ROUNDING * np.finfo(exact.dtype).eps * x).sum()))
    return Gap(float(np.square(x - other[kept]).sum()), signal, bool(kept.any()))


def _shapes(outputs: Outputs) -> list[tuple[int, ...] | None]:
    return [a.shape if a.dtype.kind == "f" else None for a in outputs]
