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

RIDGES = (1e-3, 1e-2, 1e-1)  # λ relative to the mean second moment
RIDGE = 1e-2  # where there is nothing to choose it by
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
        moments = contribution.moments
        self.first = contribution.products
        self.products = self.first.copy()
        self.energy = max(float(np.sum(self.first * moments)), 1e-30)
        self.held = contribution.held
        self.held_energy = 0.0 if self.held is None else max(float(np.sum(self.first * self.held)), 1e-30)
        self.moments = moments + ridge * np.mean(np.diag(moments)) * np.eye(len(moments))
        self.inverse = np.linalg.inv(self.moments)
        self.units = contribution.units
        self.columns = [np.flatnonzero(contribution.units == unit) for unit in range(count)]
        self.gone = np.zeros(len(moments), bool)
        self.alive = np.ones(count, bool)
        self.scores = np.zeros(count)
        self._score()

    def _score(self) -> None:
        """Cost of each unit on its own, units of equal size together."""
        for size in {len(c) for c in self.columns} - {0}:
            members = [u for u, c in enumerate(self.columns) if len(c) == size and self.alive[u]]
            if not members:
                continue
            columns = np.stack([self.columns[u] for u in members])  # (units, size)
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
        columns = np.concatenate([self.columns[u] for u in units])
        if not len(columns):
            return 0.0
        cross = self.inverse[:, columns]
        taken = np.linalg.solve(cross[columns], cross.T)
        rows = self.products[columns]
        cost = float(np.trace(np.linalg.solve(cross[columns], rows[:, columns]))) / self.energy
        half = rows - 0.5 * rows[:, columns] @ taken
        self.products -= np.concatenate([taken, half]).T @ np.concatenate([half, taken])
        self.inverse -= cross @ taken
        # What has left stays in place as a column of zeros that no other column can lean on.
        for array in (self.products, self.inverse):
            array[columns] = 0
            array[:, columns] = 0
        self.inverse[columns, columns] = 1.0
        self.gone[columns] = True
        self._score()
        return max(cost, 0.0)

    def held_error(self) -> float:
        """Relative squared error of the outputs on the samples held back, 0 without any."""
        if self.held is None or not self.gone.any():
            return 0.0
        keep = ~self.gone
        # The outputs lose M_S z, z = x_S - H_SK (H_KK)⁻¹ x_K: what the others cannot take over.
        lost = np.zeros((int(self.gone.sum()), len(keep)))
        lost[:, self.gone] = np.eye(len(lost))
        lost[:, keep] = -self.moments[np.ix_(self.gone, keep)] @ self.inverse[np.ix_(keep, keep)]
        left = (lost @ self.held) @ lost.T
        return float(np.sum(self.first[np.ix_(self.gone, self.gone)] * left)) / self.held_energy
