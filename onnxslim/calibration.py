"""Streaming statistics of intermediate tensors: one pass over the data, memory that does not grow with its length.

A statistic is fed one array per sample (``update``) and keeps a summary of fixed size. `collect` runs the model once
over the calibration data and feeds every statistic that is attached to a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

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
    """Count, mean and second moments of row vectors: ``mean`` (k,), ``gram`` (k, k) = sum of x xᵀ, in float64.

    ``rows`` turns the tensor into a matrix (n, k), one row per observation.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.count = 0
        self.total: np.ndarray | None = None
        self.gram: np.ndarray | None = None

    def update(self, array: np.ndarray) -> None:
        # A product in float32 of at most a few thousand rows, added up in float64: BLAS speed, no drift.
        for rows in _chunks(np.asarray(self._rows(array), np.float32), 4096):
            if self.total is None or self.gram is None:
                self.total = np.zeros(rows.shape[1])
                self.gram = np.zeros((rows.shape[1], rows.shape[1]))
            self.count += len(rows)
            self.total += rows.sum(0, dtype=np.float64)
            self.gram += rows.T @ rows

    @property
    def mean(self) -> np.ndarray:
        """Mean of the rows, (k,)."""
        assert self.total is not None
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> np.ndarray:
        """Centred second moments, (k, k)."""
        assert self.gram is not None
        return self.gram / max(self.count, 1) - np.outer(self.mean, self.mean)


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
            for statistic in attached:
                statistic.update(values[name])


def _chunks(rows: np.ndarray, size: int) -> Any:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
