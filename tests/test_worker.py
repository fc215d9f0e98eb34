"""How passes of several models are measured in turn, on a clock of our own."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from onnxslim import timing, worker


class _Clock:
    """Time that passes only while a model works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class _Sleeper:
    """Takes a known time, with some jitter, on a machine that becomes ten times slower in nine seconds."""

    def __init__(self, clock: _Clock, milliseconds: float) -> None:
        self.clock = clock
        self.milliseconds = milliseconds
        self.rng = np.random.default_rng([int(milliseconds), int(1e6 * clock.now)])
        self.seen: list[int] = []

    def __call__(self, k: int) -> None:
        self.seen.append(k)
        self.clock.now += self.milliseconds / 1e3 * (1 + self.clock.now) * self.rng.uniform(0.95, 1.05)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(worker, "time", clock)
    return clock


def test_ratios_hold_while_the_machine_slows_down(clock: _Clock) -> None:
    def maker(milliseconds: float) -> Callable[[], worker.Call]:
        return lambda: _Sleeper(clock, milliseconds)

    makers = [maker(20.0), maker(10.0), maker(20.0)]
    blocks = [np.array(worker.block(makers, 1.5, random.Random(k))["rounds"]) for k in range(6)]
    compared = timing.compare(blocks)
    assert compared.speedup[0] == 1.0
    assert compared.speedup[1] == pytest.approx(2.0, rel=0.03)
    assert compared.speedup[2] == pytest.approx(1.0, rel=0.03)
    for speedup, (low, high) in zip(compared.speedup, compared.interval, strict=True):
        assert low <= speedup <= high
        assert high - low < 0.2
    for latency in compared.latency:
        assert latency.p10 <= latency.median <= latency.p90
        assert latency.runs == compared.latency[0].runs > 20


def test_every_round_runs_the_next_sample_and_rounds_end_in_time(clock: _Clock) -> None:
    call = _Sleeper(clock, 5.0)
    worker.interleave([call], 0.01, random.Random(0), least=8)
    assert call.seen == list(range(8))
    call.seen.clear()
    worker.interleave([call], 100.0, random.Random(0), most=10)
    assert call.seen == list(range(10))


def test_a_block_has_as_many_rounds_as_asked_for(clock: _Clock) -> None:
    found = worker.block([lambda: _Sleeper(clock, 5.0)], 0.0, random.Random(0), least=3)
    assert len(found["rounds"]) == 3
    assert len(found["load_ms"]) == len(found["first_ms"]) == 1
