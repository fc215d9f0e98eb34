"""What each channel is worth: the error its removal leaves behind once the others have taken over what they can.

Optimal Brain Surgeon for a linear layer y = M x with second moments G of its inputs and H = G + λI: removing column s
and refitting the others costs ``|M_s|² / [H⁻¹]_ss``; then H⁻¹ loses the rank-one part of s and the next column is
judged. A unit of several columns S costs ``tr(M_S ([H⁻¹]_SS)⁻¹ M_Sᵀ)``. (Hassibi & Stork 1993; per layer, Frantar &
Alistarh, arXiv:2208.11580.)
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Contribution:
    """One contraction as importance sees it.

    Attributes:
        matrix: (out, n), the factor of every channel.
        moments: (n, n), second moments of the channels.
        units: (n,), the unit that each channel belongs to, -1 where it belongs to none.
    """

    matrix: np.ndarray
    moments: np.ndarray
    units: np.ndarray


@dataclasses.dataclass
class Order:
    """Units in the order in which they should leave, with the relative error after each: (n,) and (n,)."""

    units: np.ndarray
    error: np.ndarray


def order(contributions: list[Contribution], count: int, *, limit: int) -> Order:
    """The order in which ``count`` units should leave all ``contributions`` at once.

    The error is the sum over contributions of the squared error over the squared output. At most ``limit`` units are
    judged. Units leave in steps of about 1 % of ``count``, so that the work is made of matrix products.
    """
    states = [_State(c, count) for c in contributions if c.moments.size and np.trace(c.moments) > 0]
    step = max(1, count // 100)
    alive = np.ones(count, bool)
    units: list[int] = []
    errors: list[float] = []
    total = 0.0
    while len(units) < min(limit, count - 1):
        scores = np.where(alive, sum((s.scores for s in states), np.zeros(count)), np.inf)
        leaving = np.argsort(scores, kind="stable")[: min(step, limit - len(units), count - 1 - len(units))]
        cost = sum(state.remove(leaving) for state in states)
        # The joint cost of the step, shared out by the units' own scores.
        share = np.cumsum(scores[leaving] + 1e-30)
        errors.extend((total + cost * share / share[-1]).tolist())
        total += cost
        alive[leaving] = False
        units.extend(leaving.tolist())
    return Order(np.array(units, np.int64), np.array(errors))


class _State:
    """What is left of one contribution: its matrix after the others took over, and the inverse of its moments."""

    def __init__(self, contribution: Contribution, count: int, ridge: float = 1e-5) -> None:
        moments = contribution.moments
        self.matrix = contribution.matrix.copy()
        self.energy = max(float(np.sum((self.matrix @ moments) * self.matrix)), 1e-30)
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
