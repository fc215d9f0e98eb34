"""What each channel is worth: the error its removal leaves behind once the others have taken over what they can.

Optimal Brain Surgeon for a linear layer y = M x with second moments G of its inputs and H = G + λI: removing column s
and refitting the others costs ``|M_s|² / [H⁻¹]_ss``; then H⁻¹ loses the rank-one part of s and the next column is
judged. A unit of several columns S costs ``tr(M_S ([H⁻¹]_SS)⁻¹ M_Sᵀ)``. (Hassibi & Stork 1993; per layer, Frantar &
Alistarh, arXiv:2208.11580.)

With few observations G flatters: a channel that happens to be silent, or to look like a combination of others, seems
free. So several λ are tried, and what the refitted layer does to moments of other samples decides between them; that
error is also what the allocation of widths goes by.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from scipy.linalg import blas

RIDGES = (1e-3, 1e-2, 1e-1)  # λ relative to the mean second moment
RIDGE = 1e-2  # where there is nothing to choose it by
BULK = 0.125  # share of columns of zeros from which on the matrices are made smaller
CHECKS = 8  # points of a curve at which the error on other samples is computed


@dataclasses.dataclass
class Contribution:
    """One contraction as importance sees it.

    Attributes:
        matrix: (out, n), the factor of every channel.
        moments: (n, n), second moments of the channels.
        units: (n,), the unit that each channel belongs to, -1 where it belongs to none.
        held: (n, n), moments of samples that ``moments`` has not seen, or None.
    """

    matrix: np.ndarray
    moments: np.ndarray
    units: np.ndarray
    held: np.ndarray | None = None

    @functools.cached_property
    def products(self) -> np.ndarray:
        """MᵀM, (n, n)."""
        return self.matrix.T @ self.matrix


@dataclasses.dataclass
class Order:
    """Units in the order in which they should leave, with the relative error after each: (n,) and (n,)."""

    units: np.ndarray
    error: np.ndarray
    ridge: float = RIDGE


def order(
    contributions: list[Contribution],
    count: int,
    *,
    limit: int,
    first: Sequence[int] | np.ndarray | None = None,
    ridges: Sequence[float] | None = None,
) -> Order:
    """The order in which ``count`` units should leave all ``contributions`` at once.

    The error is the sum over contributions of the squared error over the squared output, on the moments ``held`` where
    there are some. At most ``limit`` units are judged. Units leave in steps of about 1 % of ``count``, so that the work
    is made of matrix products.

    Args:
        first: leave in this order instead of the surgeon's.
        ridges: the relative λ to try; by default `RIDGES` where ``held`` can decide between them.
    """
    usable = [c for c in contributions if c.moments.size and np.trace(c.moments) > 0]
    if ridges is None:
        ridges = RIDGES if any(c.held is not None for c in usable) else (RIDGE,)
    found = [_order(usable, count, limit, first, ridge) for ridge in ridges]
    return min(found, key=lambda o: float(o.error.sum()))


def _order(
    contributions: list[Contribution], count: int, limit: int, first: Sequence[int] | np.ndarray | None, ridge: float
) -> Order:
    states = [_State(c, count, ridge) for c in contributions]
    step = max(1, count // 100)
    most = min(limit, count - 1)
    every = max(1, -(-most // step) // CHECKS)
    alive = np.ones(count, bool)
    units: list[int] = []
    errors: list[float] = []
    points, held = [0], [0.0]
    total = 0.0
    while len(units) < most:
        scores = np.where(alive, sum((s.scores for s in states), np.zeros(count)), np.inf)
        many = min(step, most - len(units))
        if first is None:
            leaving = np.argsort(scores, kind="stable")[:many]
        else:
            leaving = np.asarray(first)[len(units) : len(units) + many]
        cost = sum(state.remove(leaving) for state in states)
        # The joint cost of the step, shared out by the units' own scores.
        share = np.cumsum(scores[leaving] + 1e-30)
        errors.extend((total + cost * share / share[-1]).tolist())
        total += cost
        alive[leaving] = False
        units.extend(leaving.tolist())
        if len(units) == most or (len(units) // step) % every == 0:
            points.append(len(units))
            held.append(sum(state.held_error() for state in states))
    error = np.array(errors)
    if any(c.held is not None for c in contributions) and most:
        error = np.interp(np.arange(1, most + 1), points, np.maximum.accumulate(held))
    return Order(np.array(units, np.int64), error, ridge)


class _State:
    """What is left of one contribution: the inverse of its moments, and the products of its columns.

    With M the matrix after the others took over, the surgeon only asks for Q = MᵀM, (n, n) however many outputs there
    are. Taking S out with A = ([H⁻¹]_SS)⁻¹ [H⁻¹]_S: turns M into M - M_S A.
    """

    def __init__(self, contribution: Contribution, count: int, ridge: float) -> None:
        moments = np.asarray(contribution.moments, np.float64)
        self.matrix = contribution.matrix
        self.first = contribution.products
        self.products = self.first.copy()
        self.energy = max(float(np.sum(self.first * moments)), 1e-30)
        self.held = None if contribution.held is None else np.asarray(contribution.held, np.float32)
        self.held_energy = 0.0 if self.held is None else max(float(np.sum(self.first * self.held)), 1e-30)
        self.moments = moments.copy()
        self.moments.flat[:: len(moments) + 1] += ridge * np.mean(np.diag(moments))
        self.inverse = np.linalg.inv(self.moments)
        self.columns = [np.flatnonzero(contribution.units == unit) for unit in range(count)]
        self.gone = np.zeros(len(moments), bool)
        self.alive = np.ones(count, bool)
        self.scores = np.zeros(count)
        # The products and the inverse have rows and columns for ``inside`` only: those that have left go out in bulk.
        self.inside = np.arange(len(moments))
        self.place = np.arange(len(moments))
        self._score()

    def _score(self) -> None:
        """Cost of each unit on its own, units of equal size together."""
        for size in {len(c) for c in self.columns} - {0}:
            members = [u for u, c in enumerate(self.columns) if len(c) == size and self.alive[u]]
            if not members:
                continue
            columns = self.place[np.stack([self.columns[u] for u in members])]  # (units, size)
            if size == 1:
                own = columns[:, 0]
                self.scores[members] = self.products[own, own] / np.maximum(self.inverse[own, own], 1e-30)
            else:
                pairs = columns[:, :, None], columns[:, None, :]
                self.scores[members] = np.trace(
                    np.linalg.solve(self.inverse[pairs], self.products[pairs]), axis1=1, axis2=2
                )
        self.scores = np.maximum(self.scores, 0.0)
        self.scores[self.alive] /= self.energy

    def remove(self, units: np.ndarray) -> float:
        """Take units out and let the others take over what they can; returns the relative error that this adds."""
        self.alive[units] = False
        leaving = np.concatenate([self.columns[u] for u in units])
        if not len(leaving):
            return 0.0
        columns = self.place[leaving]
        cross = self.inverse[:, columns]
        taken = np.linalg.solve(cross[columns], cross.T)
        rows = self.products[columns]
        cost = float(np.trace(np.linalg.solve(cross[columns], rows[:, columns]))) / self.energy
        half = rows - 0.5 * rows[:, columns] @ taken
        _subtract(self.products, np.concatenate([taken, half]).T, np.concatenate([half, taken]))
        _subtract(self.inverse, cross, taken)
        # What has left stays in place for a while as a column of zeros that no other column can lean on.
        for array in (self.products, self.inverse):
            array[columns] = 0
            array[:, columns] = 0
        self.inverse[columns, columns] = 1.0
        self.gone[leaving] = True
        if self.gone[self.inside].mean() > BULK:
            self._shrink()
        self._score()
        return max(cost, 0.0)

    def _shrink(self) -> None:
        stay = np.flatnonzero(~self.gone[self.inside])
        self.inside = self.inside[stay]
        self.place[self.inside] = np.arange(len(stay))
        self.products, self.inverse = self.products[np.ix_(stay, stay)], self.inverse[np.ix_(stay, stay)]

    def held_error(self) -> float:
        """Relative squared error of the outputs on the samples held back, 0 without any."""
        if self.held is None or not self.gone.any():
            return 0.0
        # The outputs lose M_S z, z = x_S - H_SK (H_KK)⁻¹ x_K: what the others cannot take over.
        gone, keep = np.flatnonzero(self.gone), np.flatnonzero(~self.gone)
        factor = self.matrix[:, gone] if len(self.matrix) < len(gone) else np.eye(len(gone))
        lost = np.zeros((len(factor), len(self.gone)))
        lost[:, gone] = factor
        kept = self.place[keep]
        lost[:, keep] = -(factor @ self.moments[np.ix_(gone, keep)]) @ self.inverse[np.ix_(kept, kept)]
        left = lost.astype(np.float32) @ self.held
        weighed = lost if len(self.matrix) < len(gone) else self.first[np.ix_(gone, gone)] @ lost
        return float(np.sum(weighed * left)) / self.held_energy


def _subtract(array: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Take ``left @ right`` off the symmetric ``array``, in place: a temporary would cost more than the product."""
    done = blas.dgemm(-1.0, right.T, left.T, beta=1.0, c=array.T, overwrite_c=1)
    assert np.may_share_memory(done, array)
