"""Task metrics: how good a model is on labelled samples, or how close it stays to the original.

A metric is a function ``(outputs, sample) -> float``, higher is better, averaged over the samples. ``top1`` and
``top5`` read the array ``labels`` of the sample: class ids, one per row of the output, or rows of several right ids
padded with -1; ``top1`` also takes an output that is a class id itself. ``cosine`` and ``psnr`` compare every output
with the array of that name in the sample, or, without one, with the output of the original model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxslim.data import Sample, resolve
from onnxslim.errors import DataError, OnnxslimError, UsageError

Outputs = Mapping[str, Any]
# dB that an error below the precision of float32 is worth; keeps the mean of perfect samples finite.
PSNR_CEILING = 100.0


@dataclasses.dataclass(frozen=True)
class Metric:
    """A named metric: ``function(outputs, sample, reference)`` where ``reference`` are the original's outputs."""

    name: str
    function: Callable[[Outputs, Sample, Outputs], float]
    needs_labels: bool = False

    def __call__(self, outputs: Outputs, sample: Sample, reference: Outputs) -> float:
        try:
            return float(self.function(outputs, sample, reference))
        except OnnxslimError:
            raise
        except Exception as error:  # the user's own function may raise anything
            raise UsageError(f"metric {self.name}: {type(error).__name__}: {error}") from error


def find(name: str) -> Metric:
    """The metric called ``name``, or the function ``module:function(outputs, sample) -> float``.

    Raises:
        UsageError: no such metric, or the function cannot be imported.
    """
    if name in _METRICS:
        return _METRICS[name]
    if ":" in name:
        function = resolve(name, "metric")
        return Metric(name, lambda outputs, sample, _: function(outputs, sample))
    raise UsageError(f"unknown metric {name!r}: give one of {', '.join(_METRICS)}, or module:function")


def suggested(sample: Sample, inputs: list[str]) -> Metric | None:
    """``top1`` when the sample carries class ids, else None."""
    labels = sample.get("labels")
    if labels is None or "labels" in inputs or labels.dtype.kind not in "iu":
        return None
    return _METRICS["top1"]


def parse_drop(text: str | float) -> tuple[float, bool]:
    """``"1%"`` gives (1.0, True): points of a 0-100 metric; ``0.01`` gives (0.01, False): the metric's own unit.

    Raises:
        UsageError: not a number, or negative.
    """
    percent = isinstance(text, str) and text.strip().endswith("%")
    try:
        value = float(str(text).strip().removesuffix("%"))
    except ValueError as error:
        raise UsageError(f"max drop {text!r}: give 1% or 0.01") from error
    if not (math.isfinite(value) and value >= 0):
        raise UsageError(f"max drop {text!r}: must be a number of at least 0")
    return value, percent


def allowed_drop(text: str | float, original: float) -> float:
    """The budget in the unit of a metric whose value for the original model is ``original``.

    One percent is one point of a metric that runs to 100, and a hundredth of one that runs to 1.
    """
    value, percent = parse_drop(text)
    if not percent:
        return value
    return value if abs(original) > 1.5 else value / 100


def _top(k: int) -> Callable[[Outputs, Sample, Outputs], float]:
    def accuracy(outputs: Outputs, sample: Sample, _: Outputs) -> float:
        if "labels" not in sample:
            raise DataError(f"metric top{k}: the evaluation data has no array 'labels'")
        labels = np.asarray(sample["labels"])
        labels = labels.reshape(len(labels), -1) if labels.ndim else labels.reshape(1, 1)
        best = _best(outputs, len(labels), k, int(labels.max()))
        hits = (best[:, :, None] == labels[:, None, :]) & (labels[:, None, :] >= 0)
        return float(np.mean(hits.any(axis=(1, 2))))

    return accuracy


def _best(outputs: Outputs, rows: int, k: int, highest: int) -> np.ndarray:
    """The ``k`` likeliest classes of each row, (rows, k), -1 where there is none.

    By the first output with one row of class scores per label, up to class ``highest``, or, for one class and without
    such an output, the first with one integer for each.
    """
    arrays = {name: value for name, value in outputs.items() if isinstance(value, np.ndarray)}
    for name, value in arrays.items():
        if value.dtype.kind in "fV" and value.ndim >= 2 and len(value) == rows and value.size > rows:
            scores = value.reshape(rows, -1).astype(np.float64)
            if highest >= scores.shape[1]:
                raise DataError(f"metric top{k}: label {highest} with {scores.shape[1]} classes in the output {name!r}")
            # NaN would win an argmax: a row with one is a miss.
            best = np.argsort(-np.where(np.isnan(scores), -np.inf, scores), axis=1, kind="stable")[:, :k]
            best[np.isnan(scores).any(axis=1)] = -1
            return best
    for value in arrays.values() if k == 1 else ():
        if value.dtype.kind in "iu" and value.size == rows:
            return value.reshape(rows, 1).astype(np.int64)
    shapes = {name: list(np.shape(value)) for name, value in outputs.items()}
    raise DataError(f"metric top{k}: no output holds one row of class scores for each of {rows} labels: {shapes}")


def _pairs(outputs: Outputs, sample: Sample, reference: Outputs) -> list[tuple[np.ndarray, np.ndarray]]:
    found = []
    for name, value in outputs.items():
        target = sample.get(name, reference.get(name))
        if isinstance(value, np.ndarray) and value.dtype.kind in "fV" and target is not None:
            right = np.asarray(target, np.float64)
            if right.shape != value.shape:
                raise DataError(f"output {name!r} has shape {list(value.shape)}, its reference {list(right.shape)}")
            known = np.isfinite(right)  # about the others nothing can be said
            found.append((value.astype(np.float64)[known], right[known]))
    if not found:
        raise DataError("no output holds floating-point numbers to compare")
    return found


def _cosine(outputs: Outputs, sample: Sample, reference: Outputs) -> float:
    def one(a: np.ndarray, b: np.ndarray) -> float:
        a = np.where(np.isfinite(a), a, 0.0)
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / scale if scale else float(np.array_equal(a, b))

    return float(np.mean([one(a, b) for a, b in _pairs(outputs, sample, reference)]))


def _psnr(outputs: Outputs, sample: Sample, reference: Outputs) -> float:
    """10·log10(peak² / mean squared error), where the peak is the range of the reference."""

    def one(a: np.ndarray, b: np.ndarray) -> float:
        if not b.size:
            return PSNR_CEILING
        error = float(np.mean((a - b) ** 2))
        peak = float(b.max() - b.min()) or float(np.abs(b).max()) or 1.0
        if error == 0:
            return PSNR_CEILING
        return min(PSNR_CEILING, 10 * math.log10(peak * peak / error)) if math.isfinite(error) else -PSNR_CEILING

    return float(np.mean([one(a, b) for a, b in _pairs(outputs, sample, reference)]))


_METRICS = {
    "top1": Metric("top1", _top(1), needs_labels=True),
    "top5": Metric("top5", _top(5), needs_labels=True),
    "cosine": Metric("cosine", _cosine),
    "psnr": Metric("psnr", _psnr),
}
