from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.passes.prune.allocate import Candidate, Spent, down_to, step_of, within


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Candidate], Spent]:
    """Families in a row: the weight between two of them shrinks on both axes, so that savings are not a sum."""
    count = draw(st.integers(1, 4))
    chosen = []
    for _ in range(count):
        units = draw(st.integers(2, 12))
        steps = draw(st.lists(st.floats(0.01, 1), min_size=units - 1, max_size=units - 1))
        chosen.append(Candidate(units, np.cumsum(steps), draw(st.sampled_from([1, 2, 4])), units))
    return chosen, _chain(chosen, draw(st.lists(st.floats(1, 10), min_size=count + 1, max_size=count + 1)))


def _chain(chosen: Sequence[Candidate], weights: Sequence[float]) -> Spent:
    """What weights between neighbours hold, of so many elements each when nothing has left."""

    def spent(removed: Sequence[int]) -> float:
        kept = [1.0, *(1 - m / c.count for m, c in zip(removed, chosen, strict=True)), 1.0]
        return sum(w * a * b for w, a, b in zip(weights, kept, kept[1:], strict=False))

    return spent


def _error(chosen: Sequence[Candidate], removed: Sequence[int]) -> float:
    return sum(float(c.error[m - 1]) for c, m in zip(chosen, removed, strict=True) if m)


def _every(chosen: Sequence[Candidate]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(c.widths().tolist() for c in chosen)))


@given(chains(), st.floats(0, 3))
@settings(deadline=None)
def test_within_keeps_the_sum_of_errors_and_the_steps(net: tuple[list[Candidate], Spent], tolerance: float) -> None:
    chosen, spent = net
    removed = within(chosen, spent, tolerance)
    assert _error(chosen, removed) <= tolerance + 1e-9
    for c, m in zip(chosen, removed, strict=True):
        assert m == 0 or (c.count - m) % c.step == 0
        assert m < c.count
    best = min(spent(r) for r in _every(chosen) if _error(chosen, r) <= tolerance)
    assert spent(removed) - best <= 0.25 * (spent([0] * len(chosen)) - best) + 1e-9


@given(chains(), st.floats(0.3, 1.0))
@settings(deadline=None)
def test_a_goal_is_reached_and_cheaply(net: tuple[list[Candidate], Spent], share: float) -> None:
    chosen, spent = net
    goal = share * spent([0] * len(chosen))
    removed = down_to(chosen, spent, goal)
    feasible = [r for r in _every(chosen) if spent(r) <= goal]
    if not feasible:
        assert spent(removed) == pytest.approx(min(spent(r) for r in _every(chosen)))
        return
    assert spent(removed) <= goal * (1 + 1e-6)
    # Savings are linearized: the plan is near the best one that brute force finds.
    assert _error(chosen, removed) <= 1.6 * min(_error(chosen, r) for r in feasible) + 0.3


def test_a_goal_is_reached_as_cheaply_where_savings_at_the_full_widths_mislead() -> None:
    errors = [[0.5, 1, 1.5, 1.75, 2.25, 2.75], [1, 2, 3, 4, 4.5], [1, 1.5, 2], [0.5]]
    chosen = [Candidate(len(e) + 1, np.array(e, float), 1, len(e)) for e in errors]
    spent = _chain(chosen, [1, 1, 1, 2, 4])
    goal = 0.3125 * spent([0, 0, 0, 0])
    best = min(_error(chosen, r) for r in _every(chosen) if spent(r) <= goal)
    assert _error(chosen, down_to(chosen, spent, goal)) == best == 5.25


def test_what_saves_nothing_is_not_cut() -> None:
    free = Candidate(8, np.zeros(7), 1, 7)
    dear = Candidate(8, np.arange(1, 8.0), 1, 7)
    assert down_to([free, dear], lambda r: 8.0 - r[1], 4.0) == [0, 4]


def test_free_channels_leave_first() -> None:
    free = Candidate(8, np.zeros(7), 1, 7)
    dear = Candidate(8, np.arange(1, 8.0), 1, 7)
    assert within([dear, free], lambda r: 16.0 - sum(r), 0.5) == [0, 7]


def test_no_more_leaves_than_may() -> None:
    assert down_to([Candidate(8, np.zeros(7), 1, 3)], lambda r: 8.0 - r[0], 0.0) == [3]


@pytest.mark.parametrize(
    ("channels", "units", "step"), [(128, 128, 16), (48, 48, 8), (20, 20, 4), (9, 9, 1), (768, 12, 1), (128, 64, 8)]
)
def test_steps(channels: int, units: int, step: int) -> None:
    assert step_of(channels, units) == step


@pytest.mark.parametrize(
    ("channels", "widest", "step"), [(128, 32, 32), (127, 32, 16), (64, 8, 8), (16, 8, 4), (8, 8, 1)]
)
def test_steps_of_other_kernels(channels: int, widest: int, step: int) -> None:
    assert step_of(channels, channels, widest) == step
