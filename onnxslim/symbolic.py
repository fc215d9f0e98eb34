"""Sizes that are not numbers yet: polynomials with integer coefficients over named dimensions, kept exact.

A `Dim` is an ``int`` or an `Expr`. Atoms of an expression are the named dimensions of the graph inputs, functions that
are no polynomials (rounded division, remainder, minimum, maximum, broadcast of two sizes), and unknown numbers. Two
expressions that are equal as polynomials over the same atoms are equal at run time, whatever the inputs; unequal
expressions may still be equal at run time. Named dimensions are taken to be at least 0, unknown numbers have no bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

Monomial: TypeAlias = tuple["Atom", ...]
# Above this many terms an expression is no longer worth its cost and becomes an atom of its own.
MAX_TERMS = 24


class Atom:
    """An indivisible number; atoms with equal keys are equal.

    ``key`` is a tuple: ``("dim", name)``, ``("unknown", object)`` or ``(function, argument, ...)``. ``low`` and
    ``high`` bound the number (None: no bound).
    """

    __slots__ = ("_hash", "high", "key", "low")

    def __init__(self, key: tuple[Any, ...], low: int | None, high: int | None = None) -> None:
        self.key = key
        self.low = low
        self.high = high
        self._hash = hash(key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Atom) and self._hash == other._hash and self.key == other.key)

    def __repr__(self) -> str:
        if self.key[0] == "dim":
            return str(self.key[1])
        if self.key[0] == "unknown":
            return "?"
        return f"{self.key[0]}({', '.join(map(repr, self.key[1:]))})"


class Expr:
    """A polynomial that is not a constant: monomials (atoms in a fixed order, repeated for powers) and coefficients."""

    __slots__ = ("_hash", "terms")

    def __init__(self, terms: dict[Monomial, int]) -> None:
        self.terms = terms
        self._hash = hash(frozenset(terms.items()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Expr) and self._hash == other._hash and self.terms == other.terms

    def __repr__(self) -> str:
        parts = []
        for monomial, factor in self.terms.items():
            names = "*".join(map(repr, monomial))
            parts.append(str(factor) if not monomial else names if factor == 1 else f"{factor}*{names}")
        return " + ".join(parts)

    def __add__(self, other: Dim) -> Dim:
        terms = dict(self.terms)
        for monomial, factor in _terms(other).items():
            terms[monomial] = terms.get(monomial, 0) + factor
        return _normal(terms)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return Expr({monomial: -factor for monomial, factor in self.terms.items()})

    def __sub__(self, other: Dim) -> Dim:
        return self + -other

    def __rsub__(self, other: Dim) -> Dim:
        return -self + other

    def __mul__(self, other: Dim) -> Dim:
        terms: dict[Monomial, int] = {}
        for one, a in self.terms.items():
            for two, b in _terms(other).items():
                monomial = tuple(sorted(one + two, key=hash)) if one and two else one or two
                terms[monomial] = terms.get(monomial, 0) + a * b
        return _normal(terms)

    __rmul__ = __mul__


Dim: TypeAlias = int | Expr


def named(name: str) -> Expr:
    """The dimension called ``name``."""
    return Expr({(Atom(("dim", name), 0),): 1})


def name_of(dim: Dim) -> str | None:
    """The name of a named dimension, None for every other size."""
    if isinstance(dim, Expr) and len(dim.terms) == 1:
        ((monomial, factor),) = dim.terms.items()
        if factor == 1 and len(monomial) == 1 and monomial[0].key[0] == "dim":
            return str(monomial[0].key[1])
    return None


def unknown(low: int | None = None, high: int | None = None) -> Expr:
    """A number that equals nothing but itself."""
    return Expr({(Atom(("unknown", object()), low, high),): 1})


def product(dims: Iterable[Dim]) -> Dim:
    """The product; of sizes, the number of elements."""
    result: Dim = 1
    for dim in dims:
        result = result * dim
    return result


def bounds(dim: Dim) -> tuple[int | None, int | None]:
    """Numbers that ``dim`` is never below and never above (None: no such number known)."""
    if isinstance(dim, int):
        return dim, dim
    low: int | None = 0
    high: int | None = 0
    for monomial, factor in dim.terms.items():
        bottom, top = _monomial_bounds(monomial)
        if factor < 0:
            bottom, top = top, bottom
        low = None if low is None or bottom is None else low + factor * bottom
        high = None if high is None or top is None else high + factor * top
    return low, high


def largest_factor(dim: Dim) -> int:
    """The largest number, without its sign, that stands before a term of ``dim`` or alone."""
    return abs(dim) if isinstance(dim, int) else max(map(abs, dim.terms.values()), default=0)


def sign(dim: Dim) -> int | None:
    """-1, 0 or 1 when the sign of ``dim`` is the same for all sizes, else None."""
    low, high = bounds(dim)
    if low is not None and low > 0:
        return 1
    if high is not None and high < 0:
        return -1
    if low == high == 0:
        return 0
    return None


def nonnegative(dim: Dim) -> bool:
    """True when ``dim`` is certainly not below zero."""
    low, _ = bounds(dim)
    return low is not None and low >= 0


def quotient(numerator: Sequence[Dim], denominator: Sequence[Dim]) -> Dim | None:
    """The product of ``numerator`` divided by the product of ``denominator``, or None when it is no polynomial."""
    above, below = list(numerator), []
    for dim in denominator:
        if dim in above:
            above.remove(dim)
        else:
            below.append(dim)
    return _divide(product(above), product(below))


def floor_divide(a: Dim, b: Dim) -> Dim:
    """a / b rounded towards minus infinity; ``b`` is not 0 at run time (that is an error in every runtime)."""
    if isinstance(a, int) and isinstance(b, int) and b:
        return a // b
    exact = _divide(a, b)
    if exact is not None:
        return exact
    if isinstance(b, int) and b > 0 and isinstance(a, Expr):
        # The whole part leaves the quotient, so that (h - 1) // 2 + 1 and (h + 1) // 2 are the same expression.
        whole, rest = {}, {}
        for monomial, factor in a.terms.items():
            whole[monomial], rest[monomial] = divmod(factor, b)
        inner = _normal(rest)
        low, high = bounds(inner)
        outer = None if low is None else low // b
        top = None if high is None else high // b
        return _normal(whole) + Expr({(Atom(("floor_divide", inner, b), outer, top),): 1})
    low = 0 if nonnegative(a) and nonnegative(b) else None
    return Expr({(Atom(("floor_divide", a, b), low),): 1})


def truncate_divide(a: Dim, b: Dim) -> Dim:
    """a / b rounded towards zero: the integer division of ONNX and of C."""
    if isinstance(a, int) and isinstance(b, int) and b:
        quotient_ = abs(a) // abs(b)
        return quotient_ if (a < 0) == (b < 0) else -quotient_
    exact = _divide(a, b)
    if exact is not None:
        return exact
    if nonnegative(a) and nonnegative(b):
        return floor_divide(a, b)
    return Expr({(Atom(("truncate_divide", a, b), None),): 1})


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller of two numbers."""
    if nonnegative(b - a):
        return a
    if nonnegative(a - b):
        return b
    lows = [low for low in (bounds(a)[0], bounds(b)[0]) if low is not None]
    highs = [high for high in (bounds(a)[1], bounds(b)[1]) if high is not None]
    low = min(lows) if len(lows) == 2 else None
    return Expr({(Atom(("minimum", frozenset((a, b))), low, min(highs, default=None)),): 1})


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger of two numbers."""
    return -minimum(-a, -b)


def broadcast(a: Dim, b: Dim) -> Dim:
    """Size of the result when axes of sizes a and b meet in an elementwise operator."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    # A size meets its minimum with a number above 1: the two must agree, unless the size is 1 and the minimum is too.
    for one, two in ((a, b), (b, a)):
        if _capped(two, one):
            return one
    # A size above 1 wins over whatever the other turns out to be: it must be the same or 1.
    for one, two in ((a, b), (b, a)):
        low = bounds(one)[0]
        if low is not None and low > 1 and not isinstance(two, int):
            return one
    return Expr({(Atom(("broadcast", frozenset((a, b))), 0),): 1})


def _capped(dim: Dim, size: Dim) -> bool:
    """True when ``dim`` is the minimum of ``size`` and a number above 1."""
    if not isinstance(dim, Expr) or len(dim.terms) != 1:
        return False
    ((monomial, factor),) = dim.terms.items()
    if factor != 1 or len(monomial) != 1 or monomial[0].key[0] != "minimum":
        return False
    parts = monomial[0].key[1]
    return size in parts and all(part == size or (isinstance(part, int) and part > 1) for part in parts)


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int | None:
    """The number that ``dim`` is when the named dimensions have ``sizes``; None when it holds an unknown number."""
    if isinstance(dim, int):
        return dim
    total = 0
    for monomial, factor in dim.terms.items():
        for atom in monomial:
            value = _evaluate_atom(atom, sizes)
            if value is None:
                return None
            factor *= value
        total += factor
    return total


def _evaluate_atom(atom: Atom, sizes: Mapping[str, int]) -> int | None:
    kind, *arguments = atom.key
    if kind == "dim":
        return sizes.get(arguments[0])
    if kind == "unknown":
        return None
    operands = list(arguments[0]) if isinstance(arguments[0], frozenset) else arguments
    values = [evaluate(a, sizes) for a in operands]
    numbers = [v for v in values if v is not None]
    if len(numbers) < len(values):
        return None
    if kind in ("minimum", "sum"):
        return min(numbers)
    if kind == "broadcast":
        return next((n for n in numbers if n != 1), 1)
    a, b = numbers
    return a // b if kind == "floor_divide" else int(truncate_divide(a, b))  # type: ignore[arg-type]


def _terms(dim: Dim) -> dict[Monomial, int]:
    return dim.terms if isinstance(dim, Expr) else {(): dim}


def _normal(terms: dict[Monomial, int]) -> Dim:
    terms = {monomial: factor for monomial, factor in terms.items() if factor}
    if not terms:
        return 0
    if len(terms) == 1 and () in terms:
        return terms[()]
    if len(terms) > MAX_TERMS:
        inner = Expr(terms)
        return Expr({(Atom(("sum", inner), *bounds(inner)),): 1})
    return Expr(terms)


def _monomial_bounds(monomial: Monomial) -> tuple[int | None, int | None]:
    """Bounds of a product of atoms; only products of numbers not below zero have any."""
    low: int | None = 1
    high: int | None = 1
    if len(monomial) == 1:
        return monomial[0].low, monomial[0].high
    for atom in monomial:
        if low is None or atom.low is None or atom.low < 0:
            return None, None
        low = low * atom.low
        high = None if high is None or atom.high is None else high * atom.high
    return low, high


def _divide(a: Dim, b: Dim) -> Dim | None:
    """The polynomial q with q * b == a, by long division, or None."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    divisor = _terms(b)
    # Any total order of monomials that multiplication respects will do: degree first, then the atoms one by one.
    ranks = {atom: rank for rank, atom in enumerate(dict.fromkeys(x for t in (a, b) for m in _terms(t) for x in m))}

    def order(monomial: Monomial) -> tuple[int, ...]:
        powers = [0] * len(ranks)
        for atom in monomial:
            powers[ranks[atom]] += 1
        return (len(monomial), *powers)

    lead = max(divisor, key=order)
    rest, result = dict(_terms(a)), dict[Monomial, int]()
    for _ in range(4 * MAX_TERMS):
        rest = {monomial: factor for monomial, factor in rest.items() if factor}
        if not rest:
            return _normal(result)
        top = max(rest, key=order)
        remaining = list(top)
        for atom in lead:
            if atom not in remaining:
                return None
            remaining.remove(atom)
        factor, odd = divmod(rest[top], divisor[lead])
        if odd:
            return None
        step = tuple(remaining)
        result[step] = result.get(step, 0) + factor
        for monomial, number in divisor.items():
            key = tuple(sorted(step + monomial, key=hash))
            rest[key] = rest.get(key, 0) - factor * number
    return None
