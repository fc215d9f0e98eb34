"""Runs several models in turn, round by round, and tells which passes other processes disturbed.

Part of what `onnxslim.worker` copies to other interpreters: it needs numpy only, and imports nothing of onnxslim.
"""

from __future__ import annotations

import contextlib
import gc
import glob
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Call = Callable[[int], Any]
# Warming up ends when three passes in a row are not faster than the three before them by this share.
_SETTLED, _WINDOW, _MOST_WINDOWS = 0.05, 3, 8
# A pass of several threads was spared when they waited for a core for at most this share of it. Where too few were,
# this many times as long is spent on more; and where fewer than that many are in the end, the others count too.
_WAITED, _PATIENCE, _FEWEST = 0.05, 2.0, 3


def warm_up(call: Call, seconds: float = 1.0) -> list[float]:
    """Run until the time of a pass no longer falls, for at most ``seconds`` (but two passes): ms of each."""
    spent: list[float] = []
    stop = time.perf_counter() + seconds
    best = float("inf")
    for _ in range(_MOST_WINDOWS):
        for k in range(_WINDOW):
            start = time.perf_counter()
            call(k)
            spent.append(1e3 * (time.perf_counter() - start))
            if len(spent) > 1 and time.perf_counter() > stop:
                return spent
        window = statistics.median(spent[-_WINDOW:])
        if window > best * (1 - _SETTLED):
            break
        best = min(best, window)
    return spent


class Queue:
    """Milliseconds that threads of this process, ready to run, have waited for a core so far.

    ``own()`` are those of the thread that made it, ``all()`` those of every thread there was at that time. 0 where the
    system does not tell.
    """

    def __init__(self) -> None:
        self._files: list[int] = []
        try:  # open for good: opening takes longer than a pass of a small model
            for path in ("/proc/thread-self/schedstat", *glob.glob("/proc/self/task/*/schedstat")):  # noqa: PTH207
                self._files.append(os.open(path, os.O_RDONLY))
        except OSError:
            self.close()

    def close(self) -> None:
        """Give the files back."""
        while self._files:
            os.close(self._files.pop())

    def own(self) -> float:
        return self._waited(self._files[:1])

    def all(self) -> float:
        return self._waited(self._files[1:])

    @staticmethod
    def _waited(files: Sequence[int]) -> float:
        total = 0
        for file in files:
            with contextlib.suppress(OSError, IndexError):  # a thread that has ended waits no more
                total += int(os.pread(file, 64, 0).split()[1])
        return total / 1e6


def quiet(times: Sequence[Sequence[float]], waits: Sequence[Sequence[float]]) -> np.ndarray:
    """Which passes were spared: those whose threads hardly waited for a core."""
    return np.asarray(np.asarray(waits) <= _WAITED * np.asarray(times))


def interleave(
    calls: Sequence[Call],
    seconds: float,
    rng: random.Random,
    *,
    single: Sequence[bool] = (),
    least: int = 8,
    most: int = 400,
) -> tuple[list[list[float]], list[list[float]]]:
    """Milliseconds of one pass of every call, round by round, in an order drawn anew each round.

    The k-th round runs ``call(k)``; rounds go on for ``seconds``, at least ``least`` and at most ``most`` of them.
    Where ``single`` says that a call works in this thread alone, the time that the thread waited for a core while
    others held it is no time of the model: the second table has it, and the first is without it. With several threads
    one may wait while another works, and what of it is lost cannot be told: a pass with such waiting is nan, and rounds
    go on, for twice ``seconds`` at most, until ``least`` passes of every call are without. Where hardly any is (long
    passes on a busy machine, more threads than cores), all count.
    """
    rounds: list[list[float]] = []
    waits: list[list[float]] = []
    queued: list[list[float]] = []
    order = list(range(len(calls)))
    alone = list(single) or [False] * len(calls)
    stop = time.perf_counter() + seconds

    def going() -> bool:
        if len(rounds) < least:
            return True
        late = time.perf_counter() - stop
        if late < 0 or len(rounds) >= most:
            return len(rounds) < most
        return late < _PATIENCE * seconds and int(quiet(rounds, queued).sum(axis=0).min()) < least

    with contextlib.closing(Queue()) as queue:
        while going():
            row, waited, held = [0.0] * len(calls), [0.0] * len(calls), [0.0] * len(calls)
            rng.shuffle(order)
            for i in order:
                waiting = queue.own if alone[i] else queue.all
                before = waiting()
                start = time.perf_counter()
                calls[i](len(rounds))
                spent = 1e3 * (time.perf_counter() - start)
                lost = waiting() - before
                if alone[i]:
                    waited[i] = min(lost, 0.99 * spent)
                else:
                    held[i] = lost
                row[i] = spent - waited[i]
            rounds.append(row)
            waits.append(waited)
            queued.append(held)
    counted = quiet(rounds, queued)
    if counted.sum(axis=0).min() < _FEWEST:
        counted[:] = True
    return np.where(counted, rounds, np.nan).tolist(), waits


def block(
    makers: Sequence[Callable[[], Call]],
    seconds: float,
    rng: random.Random,
    *,
    single: Sequence[bool] = (),
    least: int = 8,
    warm: float = 1.0,
) -> dict[str, list[Any]]:
    """Make all calls anew, in a random order, warm each up for at most ``warm`` seconds and run them in turn.

    ``rounds`` and ``waited`` are those of `interleave`, ``load_ms`` and ``first_ms`` the time to make each call and of
    its first pass. What a new session draws by chance (where its memory lies) is drawn anew with each block.
    """
    calls: list[Call | None] = [None] * len(makers)
    load, first = [0.0] * len(makers), [0.0] * len(makers)
    order = list(range(len(makers)))
    rng.shuffle(order)
    for i in order:
        start = time.perf_counter()
        calls[i] = makers[i]()
        load[i] = 1e3 * (time.perf_counter() - start)
    made = [call for call in calls if call is not None]
    for i in order:
        first[i] = warm_up(made[i], warm)[0]
    # The collector of cyclic garbage would run in the middle of somebody's pass.
    collecting = gc.isenabled()
    gc.disable()
    try:
        rounds, waited = interleave(made, seconds, rng, single=single, least=least)
    finally:
        if collecting:
            gc.enable()
    return {"rounds": rounds, "waited": waited, "load_ms": load, "first_ms": first}
