"""Streaming statistics of intermediate tensors: one pass over the data, memory that does not grow with its length.

A statistic is fed one array per sample (``update``) and keeps a summary of fixed size. `collect` runs the model once
over the calibration data and feeds every statistic that is attached to a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir
from scipy.linalg import blas

from onnxslim import runtime
from onnxslim.contract import Context
from onnxslim.data import Data


class Statistic(Protocol):
    """A summary of fixed size of all the arrays it was shown."""

    def update(self, array: np.ndarray) -> None:
        """Take in the value of the tensor for one sample."""
        ...


class Range:
    """Smallest and largest finite value seen."""

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf

    def update(self, array: np.ndarray) -> None:
        finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        if finite.size:
            self.low = min(self.low, float(finite.min()))
            self.high = max(self.high, float(finite.max()))


class Moments:
    """Count, means and second moments of pairs of row vectors (x, z), summed in float64.

    For a single vector x is z. Rows are gathered until a product of matrices is worth its memory traffic, and products
    are made of what rows differ from the mean of the first of them: in float32, variances that are small beside the
    mean would be lost otherwise. Pairs with NaN or infinity are left out.
    """

    GATHER = 4096  # rows; a product in float32 of so many loses nothing that matters before it is added in float64

    def __init__(self) -> None:
        self.count = 0
        self._from: dict[str, np.ndarray] = {}
        self._sums: dict[str, np.ndarray] = {}
        self._waiting: list[tuple[np.ndarray, np.ndarray | None]] = []
        self._rows = 0

    def add(self, z: np.ndarray, x: np.ndarray | None = None) -> None:
        """Take in rows (n, q), and the rows (n, p) that belong to them."""
        self._waiting.append((np.asarray(z, np.float32), None if x is None else np.asarray(x, np.float32)))
        self._rows += len(z)
        if self._rows >= self.GATHER:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = {"z": np.concatenate([pair[0] for pair in self._waiting])}
        if self._waiting[0][1] is not None:
            rows["x"] = np.concatenate([pair[1] for pair in self._waiting if pair[1] is not None])
        self._waiting, self._rows = [], 0
        start = self._from or _starts(rows)
        parts = _products(rows, start)
        if not all(np.isfinite(part).all() for part in parts.values()):
            # A row that is not finite says nothing; the squares of others may be too large for float32 only.
            finite = np.all([np.isfinite(array).all(1) for array in rows.values()], axis=0)
            rows = {name: array[finite].astype(np.float64) for name, array in rows.items()}
            start = self._from or _starts(rows)
            parts = _products(rows, start)
        if not len(rows["z"]):
            return
        self._from = start
        self.count += len(rows["z"])
        for name, part in parts.items():
            if name in self._sums:
                self._sums[name] += part
            else:
                self._sums[name] = part.astype(np.float64)

    def _offset(self, name: str) -> np.ndarray:
        """Mean of what rows differ."""
        return self._sums[name] / max(self.count, 1)

    def mean(self, name: str = "z") -> np.ndarray:
        """Mean of ``z`` or ``x``."""
        self._flush()
        return np.asarray(self._from[name] + self._offset(name))

    def second(self, name: str = "zz") -> np.ndarray:
        """Mean of z zᵀ or x zᵀ, not centred."""
        return _plus(self.covariance(name), 1.0, self.mean(name[0]), self.mean("z"))

    def covariance(self, name: str = "zz") -> np.ndarray:
        """Centred second moments."""
        self._flush()
        return _plus(self._sums[name] / max(self.count, 1), -1.0, self._offset(name[0]), self._offset("z"))

    @property
    def empty(self) -> bool:
        """True when no row was seen that is finite."""
        self._flush()
        return not self.count


def _starts(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mean of each, in numbers that float32 has."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            name: (array.mean(0, dtype=np.float64) if len(array) else np.zeros(array.shape[1])).astype(np.float32)
            for name, array in rows.items()
        }


def _products(rows: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums, and sums of products, of what rows differ from ``start``."""
    with np.errstate(over="ignore", invalid="ignore"):
        z, *x = (array - start[name] for name, array in rows.items())
        parts = {"z": z.sum(0, dtype=np.float64), "zz": z.T @ z}
        return parts | {"x": x[0].sum(0, dtype=np.float64), "xz": x[0].T @ z} if x else parts


def _plus(matrix: np.ndarray, factor: float, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``matrix + factor * outer(left, right)``, in place where ``matrix`` is in C order: these arrays can be large."""
    return np.asarray(blas.dger(factor, right, left, a=matrix.T, overwrite_a=1).T)


class RowMoments:
    """The `Moments` of the rows that ``rows`` makes of a tensor, as a statistic for `collect`."""

    def __init__(self, rows: Callable[[np.ndarray], np.ndarray]) -> None:
        self.moments = Moments()
        self._rows = rows

    def update(self, array: np.ndarray) -> None:
        self.moments.add(self._rows(array))


def collect(
    model: ir.Model,
    statistics: Mapping[str, Sequence[Statistic]],
    ctx: Context,
    *,
    data: Data | None = None,
    label: str = "calibration",
) -> None:
    """Run ``model`` over ``data`` (default: the calibration data) and update the statistics of each named tensor."""
    samples = ctx.calibration if data is None else data
    if not statistics:
        return
    feeds = ctx.progress.track(samples.feeds(), total=len(samples), label=label)
    for values in runtime.tap(model, statistics, feeds, threads=ctx.threads):
        for name, attached in statistics.items():
            value = values.pop(name)  # nothing of this sample is left in memory when the next one runs
            if not isinstance(value, np.ndarray) or not value.size:
                continue  # a sequence, or in a branch that was not taken
            for statistic in attached:
                statistic.update(value)


class Histogram:
    """Counts of the finite values seen, in bins whose width doubles when a larger value arrives.

    The bins cover [-limit, limit]; ``limit`` is a power of two times the smallest float that matters, so merging
    neighbours keeps every count in its place. Exact zeros are counted apart: quantization stores them without error,
    and after Relu they are most of the values. Extremes are exact; counts come from at most ``per_array`` values of
    each array, taken at a fixed stride. Memory: ``BINS`` counters, whatever was seen.

    Attributes:
        low, high: smallest and largest finite value.
        counts: float64 (BINS,), non-zero values.
        zeros: number of exact zeros among the counted values.
        total: number of counted values; ``elements``: number of values per array, averaged.
    """

    BINS = 8192

    def __init__(self, per_array: int = 1 << 16) -> None:
        self.per_array = per_array
        self.low = np.inf
        self.high = -np.inf
        self.limit = 0.0
        self.counts = np.zeros(self.BINS)
        self.zeros = 0
        self.total = 0
        self.arrays = 0
        self.values = 0

    @property
    def elements(self) -> float:
        """Values per array, on average."""
        return self.values / max(self.arrays, 1)

    @property
    def centers(self) -> np.ndarray:
        """The middle of each bin, (BINS,)."""
        width = 2 * self.limit / self.BINS
        return (np.arange(self.BINS) + 0.5) * width - self.limit

    def update(self, array: np.ndarray) -> None:
        flat = np.asarray(array).reshape(-1)
        self.arrays += 1
        self.values += flat.size
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            flat = flat[np.isfinite(flat)]
            if not flat.size:
                return
            low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._cover(max(abs(low), abs(high)))
        # An odd stride does not fall in step with channels and rows, which are mostly even.
        some = flat[:: -(-flat.size // self.per_array) | 1]
        values = some[some != 0]
        self.zeros += some.size - values.size
        self.total += some.size
        if values.size:
            scaled = values.astype(np.float64) * (self.BINS / 2 / self.limit) + self.BINS / 2
            index = np.minimum(scaled.astype(np.int64), self.BINS - 1)
            self.counts += np.bincount(index, minlength=self.BINS)

    def _cover(self, magnitude: float) -> None:
        if magnitude <= self.limit or magnitude == 0:
            return
        if self.limit == 0:
            self.limit = 2.0 ** np.ceil(np.log2(max(magnitude, 1e-30)))
        while self.limit < magnitude:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros(self.BINS)
            self.counts[self.BINS // 4 : self.BINS // 4 * 3] = merged
            self.limit *= 2

    def quantile(self, share: float) -> tuple[float, float]:
        """The range that leaves ``1 - share`` of the values outside, as many below as above; within the extremes."""
        mass = self.counts.copy()
        mass[self.BINS // 2] += self.zeros
        below = np.cumsum(mass)
        tail = (1 - share) / 2 * below[-1]
        width = 2 * self.limit / self.BINS
        low = np.searchsorted(below, tail) * width - self.limit
        high = (np.searchsorted(below, below[-1] - tail) + 1) * width - self.limit
        return max(self.low, low), min(self.high, high)
