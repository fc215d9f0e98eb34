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
    """What is left of one contribution: its matrix after the others took over, and the inverse of its moments."""

    def __init__(self, contribution: Contribution, count: int, ridge: float) -> None:
        moments = contribution.moments
        self.original = contribution.matrix
        self.matrix = contribution.matrix.copy()
        self.energy = _energy(self.matrix, moments)
        self.held = contribution.held
        self.held_energy = 0.0 if self.held is None else _energy(self.matrix, self.held)
        self.inverse = np.linalg.inv(moments + ridge * np.mean(np.diag(moments)) * np.eye(len(moments)))
        self.units = contribution.units
        self.columns = [np.flatnonzero(contribution.units == unit) for unit in range(count)]
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
            parts = self.matrix.T[columns]  # (units, size, out)
            if size == 1:
                diagonal = np.maximum(self.inverse[columns[:, 0], columns[:, 0]], 1e-30)
                self.scores[members] = np.sum(parts[:, 0] ** 2, axis=1) / diagonal / self.energy
            else:
                blocks = self.inverse[columns[:, :, None], columns[:, None, :]]
                self.scores[members] = np.sum(np.linalg.solve(blocks, parts) * parts, axis=(1, 2)) / self.energy

    def remove(self, units: np.ndarray) -> float:
        """Take units out and let the others take over what they can; returns the relative error that this adds."""
        self.alive[units] = False
        columns = np.concatenate([self.columns[u] for u in units])
        if not len(columns):
            return 0.0
        cross = self.inverse[:, columns]
        solved = np.linalg.solve(cross[columns], cross.T)
        part = self.matrix[:, columns]
        cost = float(np.sum(np.linalg.solve(cross[columns], part.T) * part.T)) / self.energy
        self.matrix -= part @ solved
        self.inverse -= cross @ solved
        # What has left stays in place as a column of zeros that no other column can lean on.
        self.matrix[:, columns] = 0
        self.inverse[columns] = 0
        self.inverse[:, columns] = 0
        self.inverse[columns, columns] = 1.0
        self._score()
        return max(cost, 0.0)

    def held_error(self) -> float:
        """Relative squared error of the outputs on the samples held back, 0 without any."""
        if self.held is None:
            return 0.0
        return _energy(self.original - self.matrix, self.held) / self.held_energy


def _energy(matrix: np.ndarray, moments: np.ndarray) -> float:
    return max(float(np.sum((matrix @ moments) * matrix)), 1e-30)
