from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxslim.passes.prune.allocate import Candidate, at_ratio, step_of, within


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    result = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(2, 40))
        steps = draw(st.lists(st.floats(0, 1), min_size=count - 1, max_size=count - 1))
        result.append(
            Candidate(count, np.cumsum(steps), draw(st.floats(0.5, 100)), draw(st.sampled_from([1, 2, 4, 8])))
        )
    return result


def _error(chosen: list[Candidate], removed: list[int]) -> float:
    return sum(float(c.error[m - 1]) for c, m in zip(chosen, removed, strict=True) if m)


@given(candidates(), st.floats(0, 5))
def test_within_keeps_the_sum_of_errors_and_the_steps(chosen: list[Candidate], tolerance: float) -> None:
    removed = within(chosen, tolerance)
    assert _error(chosen, removed) <= tolerance + 1e-9
    for c, m in zip(chosen, removed, strict=True):
        assert m == 0 or (c.count - m) % c.step == 0
        assert m < c.count


@given(candidates(), st.floats(0.05, 0.5))
def test_ratio_is_reached_where_the_steps_allow_it(chosen: list[Candidate], ratio: float) -> None:
    removed = at_ratio(chosen, ratio)
    goal = sum(ratio * c.count * c.gain for c in chosen)
    gained = sum(m * c.gain for c, m in zip(chosen, removed, strict=True))
    room = sum(max([w for w in c.widths() if w <= max(2 * ratio * c.count, 1)], default=0) * c.gain for c in chosen)
    assert gained >= min(goal, room) - 1e-9


def test_free_channels_leave_first() -> None:
    free = Candidate(8, np.zeros(7), 1.0, 1)
    dear = Candidate(8, np.arange(1, 8.0), 1.0, 1)
    assert within([dear, free], 0.5) == [0, 7]


@pytest.mark.parametrize(
    ("channels", "units", "step"), [(128, 128, 16), (48, 48, 8), (20, 20, 4), (9, 9, 1), (768, 12, 1), (128, 64, 8)]
)
def test_steps(channels: int, units: int, step: int) -> None:
    assert step_of(channels, units) == step
