"""Statements about ids, solved: every set of atoms that may leave leaves all statements true."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.channels import FROZEN, Ids, Solution

COUNT = 8  # ids beside the frozen one

Statement = tuple[str, int, tuple[int, ...]]
ids_ = st.integers(1, COUNT)
anything = st.one_of(
    st.tuples(st.just("tie"), ids_, st.tuples(ids_)),
    st.tuples(st.just("define"), ids_, st.lists(ids_, min_size=1, max_size=3).map(tuple)),
    st.tuples(st.just("freeze"), ids_, st.just(())),
)


@st.composite
def trees(draw: st.DrawFn) -> list[Statement]:
    """Ids 1 to 5 are tied and frozen at will; 6, 7 and 8 are each defined once, by smaller ids."""
    leaf = st.integers(1, 5)
    result: list[Statement] = [("tie", draw(leaf), (draw(leaf),)) for _ in range(draw(st.integers(0, 2)))]
    for x in range(6, COUNT + 1):
        parts = draw(st.lists(st.integers(1, x - 1), min_size=1, max_size=3))
        result.append(("define", x, tuple(parts)))
    if draw(st.booleans()):
        result.append(("freeze", draw(ids_), ()))
    return draw(st.permutations(result))


def solve(statements: list[Statement]) -> Solution:
    ids = Ids()
    ids.new(COUNT)
    for kind, x, parts in statements:
        own, others = np.array([x]), [np.array([p]) for p in parts]
        if kind == "tie":
            ids.tie(own, others[0])
        elif kind == "define":
            ids.define(own, others)
        else:
            ids.freeze(own, f"id {x}")
    return ids.solve()


def true(statements: list[Statement], gone: np.ndarray) -> bool:
    """All statements hold, and what is frozen stays."""
    return not gone[FROZEN] and all(
        not gone[x] if kind == "freeze" else gone[x] == any(gone[p] for p in parts) for kind, x, parts in statements
    )


def subsets(atoms: np.ndarray) -> list[np.ndarray]:
    return [atoms[list(mask)] for mask in itertools.product([False, True], repeat=len(atoms))]


@settings(max_examples=150, deadline=None)
@given(st.lists(anything, max_size=8))
def test_whatever_leaves_the_statements_hold(statements: list[Statement]) -> None:
    solution = solve(statements)
    everything = np.arange(COUNT + 1)
    atoms = solution.atoms(everything)
    for chosen in subsets(atoms):
        gone = solution.removed(chosen)
        assert true(statements, gone)
        assert gone[chosen].all()
        assert set(chosen) == {a for a in atoms if gone[a]}
    frozen = solution.is_frozen(everything)
    assert (frozen == ~solution.removed(atoms)).all()
    # An atom belongs to an axis exactly when its removal removes something of the axis.
    for x in everything[1:]:
        assert set(solution.atoms(np.array([x]))) == {a for a in atoms if solution.removed(np.array([a]))[x]}


@settings(max_examples=100, deadline=None)
@given(trees())
def test_every_removal_that_the_statements_allow_is_found(statements: list[Statement]) -> None:
    solution = solve(statements)
    found = {tuple(solution.removed(chosen)) for chosen in subsets(solution.atoms(np.arange(COUNT + 1)))}
    allowed = {
        (False, *gone)
        for gone in itertools.product([False, True], repeat=COUNT)
        if true(statements, np.array([False, *gone]))
    }
    assert found == allowed


@settings(max_examples=100, deadline=None)
@given(st.lists(anything, max_size=8), st.lists(st.integers(-1, 5), min_size=COUNT + 1, max_size=COUNT + 1))
def test_values_spread_to_what_their_atoms_remove(statements: list[Statement], numbers: list[int]) -> None:
    solution = solve(statements)
    values = np.full(COUNT + 1, -1)
    atoms = solution.atoms(np.arange(COUNT + 1))
    values[atoms] = np.array(numbers)[atoms]
    expected = np.full(COUNT + 1, -1)
    for atom in atoms:
        reached = solution.removed(np.array([atom]))
        expected[reached] = np.maximum(expected[reached], values[atom])
    np.testing.assert_array_equal(solution.spread(values), expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(anything, max_size=8))
def test_what_is_frozen_has_a_reason(statements: list[Statement]) -> None:
    solution = solve(statements)
    given_reasons = {f"id {x}" for kind, x, _ in statements if kind == "freeze"}
    for kind, x, _ in statements:
        if kind == "freeze":
            assert solution.reason(np.array([x])) in given_reasons
    for x in np.flatnonzero(solution.is_frozen(np.arange(COUNT + 1)))[1:]:
        assert solution.reason(np.array([x])) in given_reasons | {"tied to a slice that must stay"}


def test_a_product_of_two_is_removed_by_either() -> None:
    ids = Ids()
    columns, heads, widths = ids.new(6), ids.new(2), ids.new(3)
    ids.define(columns, [np.repeat(heads, 3), np.tile(widths, 2)])
    solution = ids.solve()
    assert set(solution.atoms(columns)) == {*heads, *widths}
    assert solution.removed(heads[:1])[columns].tolist() == [True] * 3 + [False] * 3
    assert solution.removed(widths[1:2])[columns].tolist() == [False, True, False] * 2
    roles = solution.roles(columns)
    assert {roles[h] for h in heads.tolist()} == {(3, 0)}
    assert {roles[w] for w in widths.tolist()} == {(2, 1)}


def test_definitions_that_differ_are_reconciled() -> None:
    """Six columns that one reader views as 2 x 3 and another as 3 x 2 leave all or not at all."""
    ids = Ids()
    columns = ids.new(6)
    for outer in (2, 3):
        ids.define(columns, [np.repeat(ids.new(outer), 6 // outer), np.tile(ids.new(6 // outer), outer)])
    solution = ids.solve()
    for atom in solution.atoms(columns):
        assert solution.removed(np.array([atom]))[columns].sum() in (0, 3, 6)
