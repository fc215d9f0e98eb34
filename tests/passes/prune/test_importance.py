from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.passes.prune.importance import Contribution, order


def _data(seed: int, channels: int, out: int = 3, rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, channels)) @ rng.standard_normal((channels, channels))
    x -= x.mean(0)
    return x, rng.standard_normal((out, channels))


def _left(x: np.ndarray, matrix: np.ndarray, keep: list[int]) -> float:
    """Relative squared error of the outputs once the kept columns are refitted by least squares."""
    y = x @ matrix.T
    fitted, *_ = np.linalg.lstsq(x[:, keep], y, rcond=None)
    return float(np.sum((y - x[:, keep] @ fitted) ** 2) / np.sum(y**2))


@given(st.integers(0, 1000), st.integers(3, 8))
@settings(max_examples=30, deadline=None)
def test_errors_are_those_of_the_refitted_layer(seed: int, channels: int) -> None:
    x, matrix = _data(seed, channels)
    found = order(
        [Contribution(matrix, x.T @ x / len(x), np.arange(channels))], channels, limit=channels - 1, ridges=[1e-6]
    )
    assert sorted(set(found.units.tolist())) == sorted(found.units.tolist())
    for m in range(1, len(found.units) + 1):
        keep = [c for c in range(channels) if c not in found.units[:m]]
        exact = _left(x, matrix, keep)
        # The ridge makes the estimate differ a little from plain least squares.
        assert abs(found.error[m - 1] - exact) <= 0.05 * exact + 0.02


@given(st.integers(0, 1000), st.integers(3, 8))
@settings(max_examples=30, deadline=None)
def test_the_first_to_leave_is_the_cheapest(seed: int, channels: int) -> None:
    x, matrix = _data(seed, channels)
    found = order([Contribution(matrix, x.T @ x / len(x), np.arange(channels))], channels, limit=1, ridges=[1e-6])
    costs = [_left(x, matrix, [c for c in range(channels) if c != gone]) for gone in range(channels)]
    assert costs[found.units[0]] <= min(costs) * 1.1 + 0.01


@given(st.integers(0, 1000), st.integers(4, 12), st.sampled_from([1, 3, 30]))
@settings(max_examples=30, deadline=None)
def test_errors_on_samples_held_back_are_those_of_the_layer_fitted_without_them(
    seed: int, channels: int, out: int
) -> None:
    x, matrix = _data(seed, channels, out)
    other, _ = _data(seed + 1, channels)
    moments, held, ridge = x.T @ x / len(x), other.T @ other / len(other), 1e-2
    told = Contribution(matrix, moments, np.arange(channels), held)
    found = order([told], channels, limit=channels - 1, ridges=[ridge])
    damped = moments + ridge * np.mean(np.diag(moments)) * np.eye(channels)
    wanted = []
    for m in range(1, channels):
        gone, keep = found.units[:m], [c for c in range(channels) if c not in found.units[:m]]
        lost = matrix.copy()
        lost[:, keep] = -matrix[:, gone] @ np.linalg.solve(damped[np.ix_(keep, keep)], damped[np.ix_(keep, gone)]).T
        wanted.append(np.sum((lost @ held) * lost) / np.sum((matrix @ held) * matrix))
    # Up to 8 points of the curve are computed, and it never falls.
    assert found.error[-1] == pytest.approx(max(wanted), rel=1e-3, abs=1e-6)
    if channels <= 9:
        np.testing.assert_allclose(found.error, np.maximum.accumulate(wanted), rtol=1e-3, atol=1e-6)


def test_a_copy_and_a_dead_channel_cost_nothing() -> None:
    x, matrix = _data(1, 6)
    x[:, 4] = x[:, 2]
    x[:, 5] = 0
    found = order([Contribution(matrix, x.T @ x / len(x), np.arange(6))], 6, limit=3, ridges=[1e-6])
    assert set(found.units[:2].tolist()) <= {2, 4, 5}
    assert found.error[1] < 1e-2 < found.error[2]


def test_units_of_several_columns_leave_whole() -> None:
    x, matrix = _data(2, 6)
    units = np.array([0, 0, 1, 1, 2, 2])
    found = order([Contribution(matrix, x.T @ x / len(x), units)], 3, limit=2, ridges=[1e-6])
    keep = np.flatnonzero(units != found.units[0]).tolist()
    exact = _left(x, matrix, keep)
    assert abs(found.error[0] - exact) <= 0.05 * exact + 0.02


def test_contributions_add_up() -> None:
    x, matrix = _data(3, 5)
    one = Contribution(matrix, x.T @ x / len(x), np.arange(5))
    single, double = (order([one] * k, 5, limit=1) for k in (1, 2))
    assert np.isclose(double.error[0], 2 * single.error[0])


def test_few_observations_are_not_trusted() -> None:
    """Six channels that were silent in the few samples at hand but weigh most: the samples held back tell."""
    rng = np.random.default_rng(5)
    x, matrix = rng.standard_normal((2000, 12)), rng.standard_normal((4, 12))
    seen = x.copy()
    seen[:, :6] *= 0.01
    matrix[:, :6] *= 10
    one = Contribution(matrix, seen.T @ seen / 2000, np.arange(12), x.T @ x / 2000)
    flattered, careful = order([one], 12, limit=4, ridges=[1e-9]), order([one], 12, limit=4)
    assert flattered.error[-1] > 0.2 > 0.05 > careful.error[-1]
    assert not set(careful.units.tolist()) & set(range(6))


def test_a_given_order_is_kept_and_judged() -> None:
    x, matrix = _data(4, 6)
    moments = x.T @ x / len(x)
    found = order([Contribution(matrix, moments, np.arange(6), moments)], 6, limit=4, first=[5, 0, 3, 1, 2, 4])
    assert found.units.tolist() == [5, 0, 3, 1]
    assert np.isclose(found.error[-1], _left(x, matrix, [2, 4]), rtol=0.1, atol=0.02)
