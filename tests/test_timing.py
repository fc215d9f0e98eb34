"""The interval covers the truth as often as it says, whatever the noise; "faster" is said of what is faster."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from scipy import stats

from onnxslim import timing

RNG = np.random.default_rng(3)
NOISES: dict[str, Any] = {
    "normal": lambda shape: RNG.standard_normal(shape),
    "heavy tails": lambda shape: RNG.standard_t(2, shape),
    "a tenth disturbed": lambda shape: RNG.standard_normal(shape) * np.where(RNG.random(shape) < 0.1, 10, 1),
}


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Every test draws the same, whichever ran before it in the same process."""
    RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("blocks", [5, 8, 12])
def test_the_interval_of_the_centre_covers_it(noise: str, blocks: int) -> None:
    draws = NOISES[noise]((1500, blocks)) + 0.7
    covered = [low <= 0.7 <= high for _, (low, high) in map(timing.centre, draws)]
    # 99 % is promised; 1500 draws find it within 0.8 points (three standard deviations).
    assert np.mean(covered) > timing.CONFIDENCE - 0.008


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_few_blocks_have_the_interval_of_student(count: int) -> None:
    values = RNG.standard_normal(count)
    want = stats.t.interval(timing.CONFIDENCE, count - 1, values.mean(), stats.sem(values))
    assert timing.centre(values)[1] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("count", [8, 9, 12])
def test_the_cut_is_that_of_the_signed_rank_distribution(count: int) -> None:
    ranks = np.arange(1, count + 1)
    sums = np.array([ranks @ np.array(signs) for signs in itertools.product((0, 1), repeat=count)])
    cut = timing._signed_rank_cut(count)
    tail = (1 - timing.CONFIDENCE) / 2
    assert np.mean(sums <= cut) <= tail < np.mean(sums <= cut + 1)


def _blocks(ratio: float, spread: float = 0.02, blocks: int = 12, rounds: int = 20) -> list[np.ndarray]:
    """(rounds, 2) ms: sessions differ by ``spread``, rounds by more, and the machine drifts."""
    found = []
    for k in range(blocks):
        session = np.exp(spread * RNG.standard_normal(2)) * np.array([1.0, ratio])
        found.append(5 * (1 + 0.02 * k) * session * np.exp(0.05 * RNG.standard_normal((rounds, 2))))
    return found


def test_a_file_is_as_fast_as_itself_and_a_slower_one_is_found() -> None:
    same = slower = 0
    for _ in range(100):
        low, high = timing.compare(_blocks(1.0)).interval[1]
        same += low <= 1 <= high
        found = timing.compare(_blocks(1.1))
        slower += timing.verdict(found.speedup[1], found.interval[1]) == "slower"
    assert same >= 95
    assert slower >= 90


def test_sessions_that_differ_widen_the_interval_and_rounds_do_not_narrow_it() -> None:
    def width(**options: Any) -> float:
        return float(np.median([np.ptp(timing.compare(_blocks(1.0, **options)).interval[1]) for _ in range(20)]))

    assert width(spread=0.1) > 3 * width(spread=0.02)
    assert width(spread=0.1, rounds=200) == pytest.approx(width(spread=0.1), rel=0.4)


def test_verdicts_need_the_whole_interval() -> None:
    assert timing.verdict(1.2, (1.01, 1.4)) == "faster"
    assert timing.verdict(1.2, (0.99, 1.4)) == "same within noise"
    assert timing.verdict(0.8, (0.7, 0.99)) == "slower"


def test_drift_and_disturbances_are_seen() -> None:
    steady = [np.full((10, 2), 5.0) * np.exp(0.01 * RNG.standard_normal((10, 2))) for _ in range(12)]
    assert timing.compare(steady).drift == 1.0
    assert timing.compare(steady).disturbed == 0.0
    throttled = [block * (1 + k / 12) for k, block in enumerate(steady)]
    assert timing.compare(throttled).drift == pytest.approx(0.6, abs=0.05)
    steady[3][:5] *= 4
    assert timing.compare(steady).disturbed == pytest.approx(5 / 120)


def _disturbed() -> tuple[timing.Comparison, timing.Comparison, timing.Comparison]:
    """Two models, 1.1 times apart: left alone, with 40 % of the passes held up, and with those left out."""
    blocks = _blocks(1.1, spread=0.005)
    clean = timing.compare(blocks)
    for block in blocks:
        held = RNG.random(block.shape) < 0.4
        held[0] = False
        block[held] *= 20
    wild = timing.compare(blocks)
    for block in blocks:
        block[block > 30] = np.nan
    return clean, wild, timing.compare(blocks)


def test_passes_that_were_disturbed_do_not_count() -> None:
    RNG.bit_generator.state = np.random.default_rng(17).bit_generator.state  # one in which medians bear it least
    clean, wild, found = _disturbed()
    assert timing.verdict(found.speedup[1], found.interval[1]) == "slower"
    assert np.ptp(found.interval[1]) < np.ptp(wild.interval[1]) / 3
    assert found.speedup[1] == pytest.approx(clean.speedup[1], rel=0.03)
    assert found.disturbed == pytest.approx(0.4, abs=0.06)
    assert found.latency[0].runs < clean.latency[0].runs == 12 * 20
    assert found.latency[0].median == pytest.approx(clean.latency[0].median, rel=0.05)


def test_leaving_out_disturbed_passes_seldom_widens_the_interval() -> None:
    gained = []
    for _ in range(40):
        clean, wild, found = _disturbed()
        assert timing.verdict(found.speedup[1], found.interval[1]) == "slower"
        assert found.speedup[1] == pytest.approx(clean.speedup[1], rel=0.03)
        assert found.disturbed == pytest.approx(0.4 * 19 / 20, abs=0.12)  # four standard deviations
        assert found.latency[0].runs < clean.latency[0].runs == 12 * 20
        assert found.latency[0].median == pytest.approx(clean.latency[0].median, rel=0.05)
        gained.append(np.ptp(wild.interval[1]) / np.ptp(found.interval[1]))
    # Medians bear some disturbance by themselves: seldom does leaving it out widen the interval.
    assert np.median(gained) > 1.3


def test_fewer_blocks_when_loading_is_slow() -> None:
    assert [timing.plan_blocks(load, 3.0) for load in (0.1, 0.5, 1.0, 2.0, 10.0)] == [36, 12, 12, 8, 5]
