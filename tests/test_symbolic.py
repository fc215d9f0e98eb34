"""Symbolic sizes against plain integers: an expression must be what the arithmetic on the numbers gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim import symbolic
from onnxslim.symbolic import Dim

NAMES = "abc"
SIZES = st.fixed_dictionaries({name: st.integers(0, 9) for name in NAMES})
Pair = tuple[Dim, Callable[[dict[str, int]], int]]


def _floor(a: Pair, k: int) -> Pair:
    return symbolic.floor_divide(a[0], k), lambda s: a[1](s) // k


def _truncate(a: Pair, k: int) -> Pair:
    return symbolic.truncate_divide(a[0], k), lambda s: int(a[1](s) / k)


def _binary(kind: str, a: Pair, b: Pair) -> Pair:
    x, f = a
    y, g = b
    if kind == "add":
        return x + y, lambda s: f(s) + g(s)
    if kind == "sub":
        return x - y, lambda s: f(s) - g(s)
    if kind == "mul":
        return x * y, lambda s: f(s) * g(s)
    if kind == "min":
        return symbolic.minimum(x, y), lambda s: min(f(s), g(s))
    return symbolic.maximum(x, y), lambda s: max(f(s), g(s))


def pairs() -> st.SearchStrategy[Pair]:
    """An expression, and the same computation on numbers."""
    leaves = st.one_of(
        st.sampled_from(NAMES).map(lambda n: (symbolic.named(n), lambda s: s[n])),
        st.integers(-4, 6).map(lambda k: (k, lambda s: k)),
    )
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(_binary, st.sampled_from(["add", "sub", "mul", "min", "max"]), inner, inner),
            st.builds(_floor, inner, st.integers(1, 4)),
            st.builds(_truncate, inner, st.integers(1, 4)),
        ),
        max_leaves=7,
    )


@settings(max_examples=300, deadline=None)
@given(pairs(), SIZES)
def test_expressions_are_what_the_numbers_give(pair: Pair, sizes: dict[str, int]) -> None:
    expression, function = pair
    number = function(sizes)
    assert symbolic.evaluate(expression, sizes) == number
    low, high = symbolic.bounds(expression)
    assert low is None or low <= number
    assert high is None or number <= high
    sign = symbolic.sign(expression)
    assert sign is None or sign == (number > 0) - (number < 0)


@settings(max_examples=200, deadline=None)
@given(pairs(), pairs(), SIZES)
def test_equal_expressions_are_equal_numbers(one: Pair, two: Pair, sizes: dict[str, int]) -> None:
    if one[0] == two[0]:
        assert one[1](sizes) == two[1](sizes)
    difference = one[0] - two[0]
    assert symbolic.evaluate(difference, sizes) == one[1](sizes) - two[1](sizes)


@settings(max_examples=200, deadline=None)
@given(st.lists(pairs(), min_size=1, max_size=3), st.lists(pairs(), min_size=1, max_size=3), SIZES)
def test_a_quotient_times_the_divisor_is_the_dividend(
    factors: list[Pair], more: list[Pair], sizes: dict[str, int]
) -> None:
    divisor = symbolic.product(p[0] for p in more)
    if divisor == 0:
        return
    found = symbolic.quotient([p[0] for p in (*factors, *more)], [p[0] for p in more])
    if found is not None:
        whole = symbolic.product(p[0] for p in (*factors, *more))
        assert symbolic.evaluate(found * divisor, sizes) == symbolic.evaluate(whole, sizes)


def test_forms_of_one_size_are_one_expression() -> None:
    h, n, s = symbolic.named("h"), symbolic.named("n"), symbolic.named("s")
    assert symbolic.floor_divide(h - 1, 2) + 1 == symbolic.floor_divide(h + 1, 2)
    assert (n + s) * (n - s) == n * n - s * s
    assert symbolic.quotient([n * s * 768], [n, 12]) == s * 64
    assert symbolic.quotient([(n + s) * 6], [n + s, 3]) == 2
    assert symbolic.quotient([n * 7], [2]) is None
    assert symbolic.broadcast(n, 1) == n
    assert symbolic.broadcast(n, s) == symbolic.broadcast(s, n)
    assert symbolic.unknown() != symbolic.unknown()


def test_size_meets_its_minimum_with_a_number() -> None:
    n = symbolic.named("n")
    capped = symbolic.minimum(n, 64)
    assert symbolic.broadcast(n, capped) == symbolic.broadcast(capped, n) == n
    # min(n, 1) is 1 for every n above: it does not say what n is, nor does the minimum with another size.
    for other in (symbolic.minimum(n, 1), symbolic.minimum(n, symbolic.named("m"))):
        assert symbolic.broadcast(n, other) != n or other == n


def test_only_a_named_dimension_has_a_name() -> None:
    n = symbolic.named("n")
    assert symbolic.name_of(n) == "n"
    assert all(symbolic.name_of(d) is None for d in (3, n * 2, n * n, n + 1, symbolic.unknown()))


@pytest.mark.parametrize(("a", "b"), [(1, 5), (5, 1), (5, 5), (1, 1), (0, 1)])
def test_broadcast_of_sizes_that_turn_out_to_fit(a: int, b: int) -> None:
    x, y = symbolic.named("x"), symbolic.named("y")
    assert symbolic.evaluate(symbolic.broadcast(x, y), {"x": a, "y": b}) == (max(a, b) if a and b else 0)
