"""Functions of one variable over intervals: values, slopes and rounding errors, for proofs that two of them agree.

A `Jet` holds, for every cell of a partition of the real line, the value of a function at the middle of the cell, a
bound of the error that floating-point evaluation makes there, and intervals that hold the function and its derivative
on the whole cell. For two functions f and g on a cell of width h the mean value theorem gives

    |f(x) - g(x)| <= |f(m) - g(m)| + h / 2 * sup |f' - g'|,

so that cells which are small enough prove what samples could only suggest. `agree` cuts cells until they do.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
# Larger numbers are cut: products of two of them stay finite.
HUGE = 1e150
# Proofs that take more cells than this are given up.
MOST_CELLS = 1 << 17
_ERF = np.frompyfunc(math.erf, 1, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Jet:
    """A function on cells.

    Attributes:
        mid: the value at the middle of each cell (cells,).
        err: how far an evaluation in floating point may be off there, to first order (cells,).
        low, high: the function stays between these on the cell.
        slope_low, slope_high: so does its derivative.
        eps: relative error of one operation.
        lost: cells on which an intermediate result leaves the range of the floating-point type.
        most: largest number of that type.
    """

    mid: Array
    err: Array
    low: Array
    high: Array
    slope_low: Array
    slope_high: Array
    eps: float
    lost: np.ndarray[Any, np.dtype[np.bool_]]
    most: float

    @staticmethod
    def variable(low: Array, high: Array, eps: float, most: float) -> Jet:
        """The function x on the cells from ``low`` to ``high``, free of error."""
        one = np.ones_like(low)
        return Jet((low + high) / 2, 0 * one, low, high, one, one, eps, np.zeros(low.shape, bool), most)

    def constant(self, value: float) -> Jet:
        """A constant, rounded to the floating-point type."""
        c = np.full_like(self.mid, value)
        return Jet(
            c,
            self.eps * np.abs(c) if math.isfinite(value) else 0 * self.mid,
            c,
            c,
            0 * c,
            0 * c,
            self.eps,
            np.zeros_like(self.lost),
            self.most,
        )

    def _of(self, mid: Array, err: Array, low: Array, high: Array, slopes: tuple[Array, Array], lost: Any) -> Jet:
        far = (np.minimum(np.abs(low), np.abs(high)) > self.most) & (np.sign(low) == np.sign(high))
        mid = _cut(mid, 1)
        return Jet(
            mid, _cut(err, 1) + self.eps * np.abs(mid), _cut(low, -1), _cut(high, 1),
            _cut(slopes[0], -1), _cut(slopes[1], 1), self.eps, lost | far, self.most,
        )  # fmt: skip

    def __add__(self, other: Jet) -> Jet:
        slopes = (self.slope_low + other.slope_low, self.slope_high + other.slope_high)
        lost = self.lost | other.lost
        return self._of(
            self.mid + other.mid, self.err + other.err, self.low + other.low, self.high + other.high, slopes, lost
        )

    def __neg__(self) -> Jet:
        return dataclasses.replace(
            self, mid=-self.mid, low=-self.high, high=-self.low, slope_low=-self.slope_high, slope_high=-self.slope_low
        )

    def __sub__(self, other: Jet) -> Jet:
        return self + -other

    def __mul__(self, other: Jet) -> Jet:
        low, high = _product(self.low, self.high, other.low, other.high)
        a = _product(self.slope_low, self.slope_high, other.low, other.high)
        b = _product(other.slope_low, other.slope_high, self.low, self.high)
        err = self.err * np.abs(other.mid) + other.err * np.abs(self.mid)
        return self._of(self.mid * other.mid, err, low, high, (a[0] + b[0], a[1] + b[1]), self.lost | other.lost)

    def __truediv__(self, other: Jet) -> Jet:
        return self * other.reciprocal()

    def reciprocal(self) -> Jet:
        """1 / f; a cell on which f may be zero tells nothing."""
        safe = (self.low > 0) | (self.high < 0)
        low, high, mid = (np.where(safe, a, 1.0) for a in (self.low, self.high, self.mid))
        ends = 1 / low, 1 / high
        least, most = np.minimum(*ends), np.maximum(*ends)
        square = np.minimum(*(e**2 for e in ends)), np.maximum(*(e**2 for e in ends))
        slopes = _product(self.slope_low, self.slope_high, -square[1], -square[0])
        unknown = np.where(safe, 0.0, HUGE)
        return self._of(
            1 / mid, self.err / mid**2 + unknown, least - unknown, most + unknown,
            (slopes[0] - unknown, slopes[1] + unknown), self.lost,
        )  # fmt: skip

    def log(self) -> Jet:
        """The natural logarithm of f; a cell on which f may be zero or less tells nothing."""
        positive = self.low > 0
        low, high, mid = (np.where(positive, a, 1.0) for a in (self.low, self.high, self.mid))
        slopes = _product(self.slope_low, self.slope_high, 1 / high, 1 / low)
        unknown = np.where(positive, 0.0, HUGE)
        return self._of(
            np.log(mid), self.err / mid + unknown, np.log(low) - unknown, np.log(high) + unknown,
            (slopes[0] - unknown, slopes[1] + unknown), self.lost,
        )  # fmt: skip

    def unknown(self) -> Jet:
        """A function about which nothing is known: it agrees with none."""
        return dataclasses.replace(self, mid=np.full_like(self.mid, 1e100), err=np.zeros_like(self.mid))

    def power(self, exponent: int) -> Jet:
        """f to a positive integer power."""
        result = self
        for _ in range(exponent - 1):
            result = result * self
        return result

    def rising(self, f: Callable[[Array], Array], slope: Callable[[Array], Array], peak: float | None = None) -> Jet:
        """f(self) for a function that rises everywhere, whose slope rises up to ``peak`` and falls from there on.

        Without ``peak`` the slope rises everywhere.
        """
        ends = slope(self.low), slope(self.high)
        least, most = np.minimum(*ends), np.maximum(*ends)
        if peak is not None:
            most = np.maximum(most, slope(np.clip(peak, self.low, self.high)))
        slopes = _product(self.slope_low, self.slope_high, least, most)
        return self._of(f(self.mid), self.err * np.abs(slope(self.mid)), f(self.low), f(self.high), slopes, self.lost)

    def maximum(self, other: Jet) -> Jet:
        """The larger of two functions."""
        first, second = self.low >= other.high, other.low >= self.high

        def choose(mine: Array, theirs: Array, both: Array, left: np.ndarray, right: np.ndarray) -> Array:
            return np.where(left, mine, np.where(right, theirs, both))

        slopes = (
            choose(self.slope_low, other.slope_low, np.minimum(self.slope_low, other.slope_low), first, second),
            choose(self.slope_high, other.slope_high, np.maximum(self.slope_high, other.slope_high), first, second),
        )
        lead, doubt = self.mid - other.mid, self.err + other.err
        # No arithmetic, no error but that of the larger one.
        err = choose(self.err, other.err, np.maximum(self.err, other.err), lead > doubt, -lead > doubt)
        result = self._of(
            np.maximum(self.mid, other.mid), err, np.maximum(self.low, other.low), np.maximum(self.high, other.high),
            slopes, self.lost | other.lost,
        )  # fmt: skip
        return dataclasses.replace(result, err=err)

    def minimum(self, other: Jet) -> Jet:
        """The smaller of two functions."""
        return -(-self).maximum(-other)


def _cut(a: Array, unknown: int) -> Array:
    """``a`` within +- `HUGE`; what is no number becomes the bound of that sign."""
    return np.fmax(np.fmin(a, HUGE), -HUGE) if unknown > 0 else np.fmin(np.fmax(a, -HUGE), HUGE)


def _product(a: Array, b: Array, c: Array, d: Array) -> tuple[Array, Array]:
    """All products of a number in [a, b] and one in [c, d] lie between the two results."""
    products = [a * c, a * d, b * c, b * d]
    return np.minimum.reduce(products), np.maximum.reduce(products)


def exp(x: Jet) -> Jet:
    """e to the x."""
    return x.rising(_exp, _exp)


def _exp(x: Array) -> Array:
    return np.exp(np.minimum(x, 340.0))


def log(x: Jet) -> Jet:
    """The natural logarithm; nothing is known where the argument may be zero or less."""
    return x.log()


def erf(x: Jet) -> Jet:
    """The error function."""
    return x.rising(
        lambda v: np.asarray(_ERF(v), np.float64),
        lambda v: 2 / np.sqrt(np.pi) * np.exp(-np.minimum(v * v, 700.0)),
        peak=0.0,
    )


def tanh(x: Jet) -> Jet:
    """The hyperbolic tangent."""
    return x.rising(np.tanh, lambda v: np.cosh(np.clip(v, -300.0, 300.0)) ** -2.0, peak=0.0)


def sigmoid(x: Jet) -> Jet:
    """1 / (1 + exp(-x))."""
    return x.rising(_logistic, lambda v: _logistic(v) * _logistic(-v), peak=0.0)


def _logistic(x: Array) -> Array:
    return 1 / (1 + _exp(-x))


def softplus(x: Jet) -> Jet:
    """log(1 + exp(x))."""
    return x.rising(lambda v: np.logaddexp(0.0, v), _logistic)


Function = Callable[[Jet], Jet]


def agree(f: Function, g: Function, *, eps: float, most: float, slack: float = 4.0) -> bool:
    """True when ``f`` and ``g`` are proven equal, within rounding, for every finite x.

    Within ``slack`` times what evaluating ``f`` in a type with relative error ``eps`` and largest number ``most`` may
    be off by itself, and within 64 ``eps`` of max(1, abs(g)). Where an intermediate result of ``f`` leaves the range
    of the type, f has no value to agree with. An ``f`` that is off by far more may round on purpose: it agrees with
    nothing.
    """
    powers = np.exp2(np.arange(-40.0, np.log2(most)))
    edges = np.concatenate([-powers[::-1], [0.0], powers, [most]])
    low, high = edges[:-1].copy(), edges[1:].copy()
    for _ in range(60):
        with np.errstate(all="ignore"):
            x = Jet.variable(low, high, eps, most)
            a, b = f(x), g(x)
            rise = np.maximum(np.abs(a.slope_high - b.slope_low), np.abs(b.slope_high - a.slope_low))
            apart = np.abs(a.mid - b.mid)
            bound = apart + (high - low) / 2 * rise
            allowed = np.minimum(slack * a.err, 64 * eps * np.maximum(1.0, np.abs(b.mid)))
            # Numbers this small are rounded to zero at every step.
            allowed = np.maximum(allowed, eps * 2.0**-40)
            usual = np.maximum(np.maximum(1.0, np.abs(x.mid)), np.abs(b.mid))
        known = ~a.lost & (a.err < HUGE)
        if np.any(known & ((apart > allowed) | (a.err > 256 * eps * usual))):
            return False
        left = ~a.lost & ~(bound <= allowed)
        if not left.any():
            return True
        # A cell without room for another number in it is as good as its middle.
        left &= (high - low) > 1e-12 * np.maximum(np.abs(low), np.abs(high))
        if not left.any() or left.sum() > MOST_CELLS:
            return False
        low, high = low[left], high[left]
        middle = (low + high) / 2
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])
    return False
