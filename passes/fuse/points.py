"""Functions of one variable at single points: what tells nearly all arithmetic from every known function, at once.

At a point an interval is a number, so that a `Point` needs no more than the value: a tenth of the work of a `Jet`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from onnxslim.passes.fuse.intervals import HUGE, Array, Function, Jet


class UndefinedError(Exception):
    """A value is no number, or not known: what is left of it takes intervals."""


class Point(Jet):
    """A `Jet` on cells without width: ``mid`` and ``lost`` are the same; bounds of errors and slopes are not there."""

    def __init__(self, mid: Array, eps: float, lost: Any, most: float) -> None:
        for name, value in (("mid", mid), ("eps", eps), ("lost", lost), ("most", most)):
            object.__setattr__(self, name, value)

    def constant(self, value: float) -> Jet:
        return Point(np.full_like(self.mid, value), self.eps, np.zeros_like(self.lost), self.most)

    def _at(self, mid: Array, lost: Any) -> Jet:
        if np.isnan(mid).any():
            raise UndefinedError
        size = np.abs(mid)
        if size.max() > self.most:
            lost = lost | (size > self.most)
        return Point(np.clip(mid, -HUGE, HUGE), self.eps, lost, self.most)

    def __add__(self, other: Jet) -> Jet:
        return self._at(self.mid + other.mid, self.lost | other.lost)

    def __neg__(self) -> Jet:
        return Point(-self.mid, self.eps, self.lost, self.most)

    def __mul__(self, other: Jet) -> Jet:
        return self._at(self.mid * other.mid, self.lost | other.lost)

    def reciprocal(self) -> Jet:
        if not self.mid.all():
            raise UndefinedError
        return self._at(1 / self.mid, self.lost)

    def log(self) -> Jet:
        if not (self.mid > 0).all():
            raise UndefinedError
        return self._at(np.log(self.mid), self.lost)

    def unknown(self) -> Jet:
        raise UndefinedError

    def rising(self, f: Callable[[Array], Array], slope: Callable[[Array], Array], peak: float | None = None) -> Jet:
        return self._at(f(self.mid), self.lost)

    def maximum(self, other: Jet) -> Jet:
        return self._at(np.maximum(self.mid, other.mid), self.lost | other.lost)


def at(points: Array, f: Function, eps: float, most: float) -> Jet:
    """``f`` at ``points``: its ``mid`` and ``lost`` are those that a `Jet` of cells without width has."""
    try:
        return f(Point(points, eps, np.zeros(points.shape, bool), most))
    except UndefinedError:
        return f(Jet.variable(points, points, eps, most))
