"""Zeros among the weights of a layer: which, and what the others become so that the result is off by least.

With x the inputs of an output (K,), H = E[x xᵀ] and a row w of the weight, storing v for w is off by
(v - w)ᵀ H (v - w). One weight set to zero, the others refitted, costs w² / [H⁻¹]ⱼⱼ (Hassibi and Stork, Optimal Brain
Surgeon, 1993): the cheapest go first, some at a time, and after each time the others become the least-squares solution
on the places that are left. All rows are solved together by conjugate gradients, because each has zeros of its own.
Without data H is the identity: the smallest weights go, and the others stay what they are.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from onnxslim.weights import Weight

DAMPING = 0.01
# Shares of the zeros that are there after each turn, steps of the solver in a turn and in the last one.
TURNS = (0.5, 0.75, 0.9, 1.0)
STEPS, LAST_STEPS = 15, 40
# Bins over the binary logarithms of costs.
LOW, HIGH, BINS = -100.0, 20.0, 1 << 14


@dataclasses.dataclass(frozen=True)
class Pattern:
    """At most ``kept`` of every ``of`` consecutive inputs of an output are not zero."""

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """``2:4``, or None when ``text`` is something else."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        found = cls(int(match.group(1)), int(match.group(2))) if match is not None else None
        return found if found is not None and 0 < found.kept < found.of else None


class Costs:
    """How many weights of all layers can be zero at which cost: a histogram, whatever the size of the model.

    The cost of a weight is the squared error of its layer's result over the square of that result, so that layers of
    any scale compare.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def add(self, costs: np.ndarray) -> None:
        """Take in the costs of one layer."""
        bins = (np.log2(np.maximum(costs, 2.0**LOW)) - LOW) * (BINS / (HIGH - LOW))
        self.counts += np.bincount(np.clip(bins, 0, BINS - 1).astype(np.int64).reshape(-1), minlength=BINS)

    def limit(self, ratio: float) -> float:
        """The cost below which the share ``ratio`` of all weights lies."""
        below = np.cumsum(self.counts)
        place = int(np.searchsorted(below, ratio * below[-1]))
        return float(2.0 ** (LOW + (place + 1) * (HIGH - LOW) / BINS))


class Layer:
    """One weight and what it multiplies; ``moments`` (groups, K, K), None where nothing is known."""

    def __init__(self, weight: Weight, array: np.ndarray, moments: np.ndarray | None) -> None:
        self.weight = weight
        self.array = array
        self.rows = weight.rows(array)
        self.solves = moments is not None
        width = self.rows.shape[-1]
        if moments is None:
            self.moments, self.inverse = np.zeros((1, 0, 0), np.float32), np.ones((1, 1, width), np.float32)
            energy = np.square(self.rows, dtype=np.float64).sum()
        else:
            level = np.trace(moments, axis1=1, axis2=2) / width
            damped = moments + np.maximum(DAMPING * level, 1e-12)[:, None, None] * np.eye(width)
            self.inverse = np.diagonal(np.linalg.inv(damped), axis1=1, axis2=2)[:, None].astype(np.float32)
            self.moments = damped.astype(np.float32)
            energy = ((self.rows @ self.moments) * self.rows).sum(dtype=np.float64)
        self.energy = max(float(energy), 1e-30)

    def costs(self, rows: np.ndarray) -> np.ndarray:
        """What it costs to set each of ``rows`` to zero, relative to the square of the layer's result."""
        return np.asarray(np.square(rows) / (self.inverse * self.energy))

    def share(self, limit: float) -> float:
        """The share of the weights that cost less than ``limit``."""
        return float((self.costs(self.rows) < limit).mean())

    def thinned(self, goal: float | Pattern) -> np.ndarray:
        """The weight with the share ``goal`` of it set to zero, or in a pattern; in its own shape."""
        rows = self.rows
        for turn in _turns(goal):
            keep = self._keep(rows, turn)
            rows = self.refit(rows, keep, STEPS) if self.solves else rows * keep
        if self.solves:
            rows = self.refit(rows, rows != 0, LAST_STEPS)
        return self.weight.restored(rows.astype(np.float32), self.array.shape)

    def _keep(self, rows: np.ndarray, goal: float | Pattern) -> np.ndarray:
        """True where ``rows`` stay; zeros leave first."""
        costs = np.where(rows == 0, np.float32(-1), self.costs(rows))
        if isinstance(goal, float):
            count = min(round(goal * costs.size), costs.size)
            if count == costs.size:
                return np.zeros(costs.shape, bool)
            return np.asarray(costs >= np.partition(costs.reshape(-1), count)[count])
        shape, axis = self.array.shape, self.weight.axis
        last = np.moveaxis(self.weight.restored(costs, shape), axis, -1)
        groups = last.reshape(-1, goal.of)
        keep = np.zeros(groups.shape, bool)
        np.put_along_axis(keep, np.argsort(groups, axis=1)[:, -goal.kept :], True, 1)
        return self.weight.rows(np.moveaxis(keep.reshape(last.shape), -1, axis))

    def refit(self, rows: np.ndarray, keep: np.ndarray, steps: int) -> np.ndarray:
        """Rows that are zero outside ``keep`` with the result nearest to the original's, found from ``rows`` on."""
        rows = rows * keep
        diagonal = np.diagonal(self.moments, axis1=1, axis2=2)[:, None]
        left = ((self.rows - rows) @ self.moments) * keep
        step = left / diagonal
        size = (left * step).sum(-1, keepdims=True)
        for _ in range(steps):
            change = (step @ self.moments) * keep
            length = size / np.maximum((step * change).sum(-1, keepdims=True), 1e-30)
            rows = rows + length * step
            left = left - length * change
            before, size = size, (left * left / diagonal).sum(-1, keepdims=True)
            step = left / diagonal + size / np.maximum(before, 1e-30) * step
        return np.asarray(rows)


def _turns(goal: float | Pattern) -> list[float] | list[Pattern]:
    """The goals on the way to ``goal``: one zero more in each group, or a larger share."""
    if isinstance(goal, Pattern):
        return [Pattern(kept, goal.of) for kept in range(goal.of - 1, goal.kept - 1, -1)]
    return [float(goal * share) for share in TURNS]
