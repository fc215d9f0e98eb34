"""How passes of several models are measured in turn, on a clock of our own; and how waiting for a core is seen."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from onnxslim import rounds, timing


class _Clock:
    """Time that passes only while a model works, and the milliseconds that its threads waited for a core."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waited = 0.0

    def perf_counter(self) -> float:
        return self.now

    def own(self) -> float:
        return self.waited

    all = own

    def close(self) -> None:
        pass


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
    monkeypatch.setattr(rounds, "time", clock)
    monkeypatch.setattr(rounds, "Queue", lambda: clock)
    return clock


def test_ratios_hold_while_the_machine_slows_down(clock: _Clock) -> None:
    def maker(milliseconds: float) -> Callable[[], rounds.Call]:
        return lambda: _Sleeper(clock, milliseconds)

    makers = [maker(20.0), maker(10.0), maker(20.0)]
    blocks = [np.array(rounds.block(makers, 1.5, random.Random(k))["rounds"]) for k in range(6)]
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
    rounds.interleave([call], 0.01, random.Random(0), least=8)
    assert call.seen == list(range(8))
    call.seen.clear()
    rounds.interleave([call], 100.0, random.Random(0), most=10)
    assert call.seen == list(range(10))


def test_a_block_has_as_many_rounds_as_asked_for(clock: _Clock) -> None:
    found = rounds.block([lambda: _Sleeper(clock, 5.0)], 0.0, random.Random(0), least=3)
    assert len(found["rounds"]) == 3
    assert len(found["load_ms"]) == len(found["first_ms"]) == 1


def _held(clock: _Clock, milliseconds: float, waits: Iterable[float]) -> rounds.Call:
    """Takes a known time, and longer by as much as its threads wait in each pass."""
    coming = iter(waits)

    def call(_: int) -> None:
        waited = next(coming)
        clock.waited += waited
        clock.now += (milliseconds + waited) / 1e3

    return call


def test_a_block_warms_up_for_as_long_as_asked_for(clock: _Clock) -> None:
    def warmed_up(milliseconds: float, warm: float) -> int:
        call = _held(clock, milliseconds, passes := iter([0.0] * 100))
        rounds.block([lambda: call], 0.0, random.Random(0), least=3, warm=warm)
        return 100 - 3 - len(list(passes))

    assert warmed_up(20.0, 0.03) == warmed_up(500.0, 0.03) == 2
    assert warmed_up(1.0, 0.03) == warmed_up(20.0, 1.0) == 6


def test_with_several_threads_passes_that_waited_do_not_count(clock: _Clock) -> None:
    call = _held(clock, 10.0, itertools.cycle([0.0, 30.0, 0.1, 0.0]))
    found, waits = rounds.interleave([call], 0.0, random.Random(0))
    assert np.allclose(found[:4], [[10.0], [np.nan], [10.1], [10.0]], equal_nan=True)
    assert not np.any(waits), "nothing is taken off"


def test_in_one_thread_waiting_is_taken_off_and_every_pass_counts(clock: _Clock) -> None:
    call = _held(clock, 10.0, itertools.cycle([0.0, 30.0]))
    found, waits = rounds.interleave([call], 0.0, random.Random(0), single=[True])
    assert np.allclose(found, 10.0)
    assert waits == [[0.0], [30.0]] * 4


def test_rounds_go_on_for_a_while_until_enough_count(clock: _Clock) -> None:
    def lengths(waits: Iterable[float], seconds: float) -> tuple[int, int]:
        found, _ = rounds.interleave([_held(clock, 10.0, waits)], seconds, random.Random(0), least=8)
        return len(found), int(np.sum(~np.isnan(found)))

    assert lengths(itertools.repeat(0.0), 0.05) == (8, 8)
    # Every other pass takes 30 ms, of which it waits 20: sixteen of them last 320 ms.
    assert lengths(itertools.cycle([20.0, 0.0]), 0.2) == (16, 8)
    # Three times 50 ms are over before eight passes count.
    assert lengths(itertools.cycle([20.0, 0.0]), 0.05) == (8, 4)
    assert lengths(itertools.cycle([20.0, 0.0]), 0.0) == (8, 4)


@pytest.mark.parametrize("spared", [0, 2, 3])
def test_where_hardly_a_pass_was_spared_all_of_the_block_count(clock: _Clock, spared: int) -> None:
    waits = [0.0] * spared + [20.0] * (8 - spared)
    calls = [_held(clock, 10.0, waits), _held(clock, 10.0, [0.0] * 8)]
    found, _ = rounds.interleave(calls, 0.0, random.Random(0))
    assert np.isnan(found).sum() == (5 if spared == 3 else 0)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this system does not tell")
def test_the_queue_sees_threads_that_wait_for_a_core() -> None:
    """A process that spins on a core and a thread of this one that works there too: each waits for the other."""
    cores = os.sched_getaffinity(0)
    core = {min(cores)}
    go, done, leave = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        os.sched_setaffinity(0, core)  # of this thread alone
        stop = time.thread_time() + 0.1
        while time.thread_time() < stop:
            pass

    def late() -> None:
        go.wait()
        work()
        done.set()
        leave.wait()  # what a thread waited goes with it

    other = threading.Thread(target=late)
    other.start()
    queue = rounds.Queue()
    spin = f"import os; os.sched_setaffinity(0, {core}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            before = queue.all()
            go.set()
            done.wait()
            assert queue.all() - before > 5
            before = queue.own()
            work()
            assert queue.own() - before > 5
        finally:
            os.sched_setaffinity(0, cores)
            process.kill()
            go.set()
            leave.set()
    queue.close()
    assert queue.own() == queue.all() == 0


def test_where_the_system_does_not_tell_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError

    monkeypatch.setattr(rounds.os, "open", refuse)
    queue = rounds.Queue()
    assert queue.own() == queue.all() == 0
