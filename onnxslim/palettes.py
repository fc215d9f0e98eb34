"""Weights that share a few values: the values, and which of them each weight takes.

The values of a weight are the means of k clusters of its numbers on a line (Lloyd, Least squares quantization in PCM,
1982), found on sorted numbers with running sums, so that a step costs k searches whatever the size of the weight. With
the second moments of what the weight multiplies, numbers count by the mean square of their input, and which value each
takes is chosen so that the product, not the weight, is off by least (`onnxslim.rounding`).
"""

from __future__ import annotations

import contextlib

import numpy as np
from scipy import linalg

from onnxslim.rounding import settle_columns, spreading
from onnxslim.weights import Weight

STEPS, STILL = 200, 1e-6
# Share of exact zeros from which on zero is a value of its own.
SPARSE = 0.01
_BINS = 4096


def shared(weight: Weight, array: np.ndarray, count: int, moments: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """At most ``count`` sorted values, float32, and which of them each number takes, uint8 in the shape of ``array``.

    Args:
        count: at most 256.
        moments: (groups, K, K), see `Weight.moments`; None where they are not known.
    """
    rows = weight.rows(np.asarray(array, np.float32))
    importance = None
    if moments is not None:
        diagonal = np.diagonal(moments, axis1=1, axis2=2)[:, None]
        importance = np.broadcast_to(np.maximum(diagonal, 1e-6 * diagonal.mean()), rows.shape)
    values = palette(rows, count, importance)
    index = nearest(values, rows)
    if moments is not None:
        for group, part in enumerate(rows):
            index[group] = _refined(part, values, index[group], moments[group])
    return values, weight.restored(index, array.shape)


def palette(numbers: np.ndarray, count: int, importance: np.ndarray | None = None) -> np.ndarray:
    """At most ``count`` sorted values, float32, with a small squared distance of ``numbers`` from the nearest.

    Zero is one of them where more than a few numbers are exactly zero. ``importance`` has the shape of ``numbers``.
    """
    flat = numbers.reshape(-1)
    weights = np.ones(flat.size) if importance is None else np.asarray(importance, np.float64).reshape(-1)
    kept = flat != 0
    if count > 1 and kept.mean() <= 1 - SPARSE:
        found = _lloyd(flat[kept], count - 1, weights[kept]) if kept.any() else flat[:0]
        return np.unique(np.append(found, np.float32(0)))
    return _lloyd(flat, count, weights)


def nearest(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The index, uint8, of the nearest of the sorted ``values`` to each of ``numbers``; of zero to zero, if there."""
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2  # of denormal numbers too
    index = np.searchsorted(middles, numbers)
    return index.astype(np.uint8)


def _lloyd(numbers: np.ndarray, count: int, weights: np.ndarray) -> np.ndarray:
    order = np.argsort(numbers, kind="stable")
    # Where no number counts, all count alike.
    numbers, weights = numbers[order].astype(np.float64), weights[order] if weights.any() else np.ones(len(order))
    distinct = np.unique(numbers)
    if len(distinct) <= count:
        return distinct.astype(np.float32)
    sums = [np.concatenate([[0.0], np.cumsum(weights * numbers**k)]) for k in range(3)]
    # Where many values serve a density f, their best density goes with its cube root (Panter and Dite, 1951).
    density, edges = np.histogram(numbers, _BINS, weights=weights)
    below = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    steps = (np.arange(count) + 0.5) / count
    starts = np.interp(steps * below[-1], below, edges), np.linspace(numbers[0], numbers[-1], count)
    return min((_settled(numbers, sums, start) for start in starts), key=lambda found: found[1])[0]


def _settled(numbers: np.ndarray, sums: list[np.ndarray], values: np.ndarray) -> tuple[np.ndarray, float]:
    """Where ``values`` come to rest, and the squared error; ``sums`` are running ones of the weights' powers 0 to 2."""
    count = len(values)
    for _ in range(STEPS):
        cuts = _cuts(numbers, values)
        inside, moment = (np.diff(each[cuts]) for each in sums[:2])
        means = moment[inside > 0] / inside[inside > 0]
        if len(means) < count:
            means = _split(numbers, means, count - len(means))
        moved = np.abs(means - values).max() if len(means) == len(values) else np.inf
        values = means
        if moved <= STILL * (numbers[-1] - numbers[0]):
            break
    values = np.unique(values.astype(np.float32))
    inside, moment, square = (np.diff(each[_cuts(numbers, values)]) for each in sums)
    return values, float(np.sum(square - 2 * values * moment + values.astype(np.float64) ** 2 * inside))


def _cuts(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where the numbers of each value begin, and where the last ones end."""
    return np.concatenate([[0], np.searchsorted(numbers, (values[1:] + values[:-1]) / 2), [len(numbers)]])


def _split(numbers: np.ndarray, values: np.ndarray, spare: int) -> np.ndarray:
    """``values``, and ``spare`` more where there is use for them: the ends of the widest clusters, for their means."""
    cuts = _cuts(numbers, values)
    low, high = numbers[cuts[:-1]], numbers[cuts[1:] - 1]
    wide = np.argsort(low - high, kind="stable")[:spare]
    wide = wide[high[wide] > low[wide]]
    return np.sort(np.concatenate([np.delete(values, wide), low[wide], high[wide]]))


def _refined(rows: np.ndarray, values: np.ndarray, plain: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """``plain`` again where another choice gives a nearer product; zeros keep their value."""
    spread = None
    with contextlib.suppress(linalg.LinAlgError):  # singular to working precision: the nearest stay
        spread = spreading(moments)
    if spread is None:
        return plain
    index = plain.copy()
    fixed = (rows == 0) & (values[plain] == 0)

    def settle(k: int, column: np.ndarray) -> np.ndarray:
        index[:, k] = np.where(fixed[:, k], plain[:, k], nearest(values, column))
        return values[index[:, k]]

    settle_columns(rows, spread, settle)
    gaps = [values[choice] - rows for choice in (plain, index)]
    costs = [((gap @ moments) * gap).sum(1) for gap in gaps]
    return np.where((costs[1] < costs[0])[:, None], index, plain)
