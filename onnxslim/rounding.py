"""Rounds the weights of a product so that the result, not each weight, is off by least.

With x the inputs of one output (K,), H = E[x xᵀ] and a row w of the weight, storing w as q changes the result by
(q - w)·x, whose mean square is (q - w)ᵀ H (q - w). Columns are rounded one after the other, and the error of each is
spread over the ones to come along the inverse of H (Frantar et al., GPTQ, 2023; Hassibi and Stork, 1993).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import linalg

from onnxslim.graph import attribute
from onnxslim.quantization import LARGEST, LARGEST_PAIR, QParams
from onnxslim.units import Unit

# Rows that the moments are made of, over all samples, and the widest product whose moments (K x K numbers) are kept.
ROWS, WIDEST = 16_384, 2048
# A product of so many rows costs as much as one of many more, and takes little memory beside the sums it is added to.
BATCH = 512
BLOCK = 64
# Weights that are rounded at a time: each takes the memory of a dozen on the way.
ELEMENTS = 1 << 22
DAMPING = 0.01


class Gram:
    """Second moments of what each group of a product multiplies: (groups, K, K).

    Rows are taken at a stride, about ``rows`` from each sample.
    """

    def __init__(self, unit: Unit, shape: tuple[int, ...], rows: int) -> None:
        node = unit.node
        self.rows = rows
        self.is_conv = node.op_type == "Conv"
        self.groups = int(attribute(node, "group", 1)) if self.is_conv else 1
        self.window = shape[2:] if self.is_conv else ()
        self.width = int(np.prod(shape[1:])) if self.is_conv else shape[1 - (unit.weight or (1, 0))[1]]
        rank = len(self.window)
        self.strides = attribute(node, "strides", [1] * rank) if self.is_conv else []
        self.dilations = attribute(node, "dilations", [1] * rank) if self.is_conv else []
        self.pads = attribute(node, "pads", [0] * 2 * rank) if self.is_conv else []
        # Padding by rule is symmetric but for one element: the moments hardly change.
        if self.is_conv and attribute(node, "auto_pad", "NOTSET").startswith("SAME"):
            self.pads = [(k - 1) // 2 for k in self.window] * 2
        # One block for the rows that wait: thousands of small arrays would leave holes that no later array fits into.
        self._block: np.ndarray | None = None
        self._waiting = 0
        self.count = 0
        self.square = np.zeros((self.groups, self.width, self.width))

    def update(self, array: np.ndarray) -> None:
        rows = self.some(array)
        if not rows.shape[1]:
            return
        if self._block is None:
            self._block = np.empty((self.groups, BATCH, self.width), np.float32)
        while rows.shape[1]:
            taken = rows[:, : BATCH - self._waiting]
            stop = self._waiting + taken.shape[1]
            self._block[:, self._waiting : stop] = taken
            self._waiting, rows = stop, rows[:, taken.shape[1] :]
            if stop == BATCH:
                self._flush()

    def _flush(self) -> None:
        """Take in the rows collected; in batches, because the sums are large and the rows of a sample few."""
        if self._block is None or not self._waiting:
            return
        rows = self._block[:, : self._waiting]
        self.count, self._waiting = self.count + self._waiting, 0
        self.square += rows.transpose(0, 2, 1) @ rows

    def finish(self) -> None:
        """Take in what waits and give its memory back; more rows may follow."""
        self._flush()
        self._block = None

    def some(self, array: np.ndarray) -> np.ndarray:
        """(groups, n, K), float32: ``windows`` thinned out, without those that are NaN or infinite in some group."""
        rows = self.windows(array)
        rows = rows[:, :: max(-(-rows.shape[1] // self.rows), 1)].astype(np.float32)
        known = np.isfinite(rows)
        return rows if known.all() else rows[:, known.all((0, 2))]

    def windows(self, array: np.ndarray) -> np.ndarray:
        """(groups, positions, K): what each output of the product multiplies; of a Conv, thinned out."""
        if not self.is_conv:
            return array.reshape(1, -1, array.shape[-1])
        rank = len(self.window)
        padded = np.pad(array, [(0, 0), (0, 0), *zip(self.pads[:rank], self.pads[rank:], strict=True)])
        reach = [(k - 1) * d + 1 for k, d in zip(self.window, self.dilations, strict=True)]
        if any(size < r for size, r in zip(padded.shape[2:], reach, strict=True)):
            return np.zeros((self.groups, 0, self.width))
        views = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
        steps = tuple(slice(None, None, s) for s in (1, 1, *self.strides, *self.dilations))
        views = views[steps]
        positions = views.shape[2 : 2 + rank]
        # Thin out one sample at a time before anything is copied.
        keep = -(-int(np.prod(positions)) * len(array) // self.rows)
        chosen = np.unravel_index(np.arange(0, int(np.prod(positions)), max(keep, 1)), positions)
        everything: tuple[Any, ...] = (slice(None), slice(None), *chosen)
        picked = views[everything]  # (n, channels, m, window)
        n, channels, m = picked.shape[:3]
        grouped = picked.reshape(n, self.groups, channels // self.groups, m, -1)
        return grouped.transpose(1, 0, 3, 2, 4).reshape(self.groups, n * m, self.width)

    @property
    def matrix(self) -> np.ndarray:
        """Second moments, (groups, K, K)."""
        self.finish()
        return self.square / max(self.count, 1)


def round_rows(
    rows: np.ndarray,
    scale: np.ndarray,
    spread: tuple[np.ndarray, np.ndarray],
    pairs: np.ndarray | None = None,
) -> np.ndarray:
    """Integers (outputs, K) for ``rows`` (outputs, K) in steps of ``scale`` (outputs,), so that products lose least.

    Args:
        spread: see `spreading`.
        pairs: columns whose sum is limited, see `quantization.within_pairs`.
    """
    partner = {} if pairs is None else {int(a): int(b) for pair in pairs for a, b in (pair, pair[::-1])}
    stored = np.zeros(rows.T.shape)  # a column is a row here, see `settle_columns`
    low, high = np.full(len(rows), -LARGEST), np.full(len(rows), LARGEST)

    def settle(k: int, column: np.ndarray) -> np.ndarray:
        least, most = low, high
        if k in partner:  # not settled yet, it is 0 and leaves the whole range
            other = stored[partner[k]]
            least, most = np.maximum(low, -LARGEST_PAIR - other), np.minimum(high, LARGEST_PAIR - other)
        stored[k] = np.clip(np.rint(column), least, most)
        return stored[k]

    settle_columns(rows.astype(np.float64) / scale[:, None].astype(np.float64), spread, settle)
    return np.ascontiguousarray(stored.T.astype(np.int8))


def spreading(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order (K,) in which columns are rounded, and the factor (K, K) that spreads the error of each.

    Args:
        moments: H, (K, K), symmetric and positive semidefinite.

    Raises:
        scipy.linalg.LinAlgError: moments that are singular to working precision.
    """
    width = len(moments)
    diagonal = np.diag(moments)
    # The columns that matter most are rounded first: their error can still be made up for.
    order = np.argsort(-diagonal, kind="stable")
    damped = moments[np.ix_(order, order)] + np.eye(width) * max(DAMPING * float(diagonal.mean()), 1e-30)
    # Upper triangular with factorᵀ factor = H⁻¹: row k spreads the error of column k. From the Cholesky factor of the
    # reversed matrix, whose inverse is triangular as well.
    upper = linalg.cholesky(damped[::-1, ::-1], lower=True, check_finite=False)[::-1, ::-1]
    return order, linalg.solve_triangular(upper, np.eye(width), check_finite=False)


def round_columns(
    rows: np.ndarray,
    step: np.ndarray,
    zero: np.ndarray,
    spread: tuple[np.ndarray, np.ndarray],
    low: int,
    high: int,
) -> np.ndarray:
    """Whole numbers q in [low, high] for ``rows`` (outputs, K), so that (q - zero) * step is off by least.

    Args:
        step, zero: of every element, (outputs, K) or broadcastable.
        spread: see `spreading`.
    """
    step, zero = (np.broadcast_to(a, rows.shape) for a in (step, zero))
    stored = np.empty(rows.shape)

    def settle(k: int, column: np.ndarray) -> np.ndarray:
        stored[:, k] = np.clip(np.rint(column / step[:, k]) + zero[:, k], low, high)
        return np.asarray((stored[:, k] - zero[:, k]) * step[:, k])

    settle_columns(rows, spread, settle)
    return stored


def settle_columns(
    rows: np.ndarray, spread: tuple[np.ndarray, np.ndarray], settle: Callable[[int, np.ndarray], np.ndarray]
) -> np.ndarray:
    """``rows`` (outputs, K) with values that can be stored, chosen so that the product is off by least.

    Args:
        spread: see `spreading`.
        settle: given the index of a column and what it would best be by now, (outputs,), the values to store.
    """
    order, factor = spread
    # Columns as rows, so that those that wait lie side by side in memory.
    left = np.ascontiguousarray(rows.T[order], np.float64)
    result = np.empty_like(left)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]))
        for k in range(start, stop):
            result[k] = settle(int(order[k]), left[k])
            errors[k - start] = (left[k] - result[k]) / factor[k, k]
            left[k + 1 : stop] -= factor[k, k + 1 : stop, None] * errors[k - start]
        left[stop:] -= factor[start:stop, stop:].T @ errors
    back = np.empty_like(rows, dtype=np.float64)
    back[:, order] = result.T
    return back


def refine(
    weight: np.ndarray,
    stored: np.ndarray,
    params: QParams,
    gram: Gram,
    axis: int,
    pairs: np.ndarray | None = None,
) -> np.ndarray:
    """``stored`` again with the rounding that suits the inputs seen; never worse than before under their moments.

    Args:
        pairs: inputs of each output whose sum is limited, see `quantization.within_pairs`.
    """
    moments = gram.matrix
    if not gram.count or not np.isfinite(moments).all():
        return stored
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    old = np.moveaxis(stored, axis, 0).reshape(rows.shape)
    scale = np.broadcast_to(params.scale, (len(rows),)).astype(np.float64)
    new = old.copy()
    per_group = len(rows) // gram.groups
    height = max(ELEMENTS // max(rows.shape[1], 1), 1)
    for group in range(gram.groups):
        try:
            spread = spreading(moments[group])
        except linalg.LinAlgError:  # moments that are singular to working precision: plain rounding stays
            continue
        end = (group + 1) * per_group
        for start in range(group * per_group, end, height):
            part = slice(start, min(start + height, end))
            trial = round_rows(rows[part], scale[part], spread, pairs)

            def cost(q: np.ndarray, part: slice = part, group: int = group) -> np.ndarray:
                gap = q * scale[part, None] - rows[part]
                return np.asarray(((gap @ moments[group]) * gap).sum(1))

            better = cost(trial) < cost(old[part])
            new[part] = np.where(better[:, None], trial, old[part])
    shape = np.moveaxis(weight, axis, 0).shape
    return np.ascontiguousarray(np.moveaxis(new.reshape(shape), 0, axis))
