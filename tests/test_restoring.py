"""`restoring`: what goes back so that the rest is borne, on noise that adds up; which samples judge."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.contract import Context
from onnxslim.data import Data, InputSpec
from onnxslim.noise import noise
from onnxslim.restoring import ALONE, DOUBT, RUNS, WORK, Judge, keep, parts
from onnxslim.results import KIND, Exact


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12),
    st.floats(0.0, 3.0),
    st.lists(st.floats(0.1, 10.0), min_size=12, max_size=12),
)
def test_the_budget_holds_and_nothing_more_fits(noises: list[float], budget: float, prices: list[float]) -> None:
    alone = {f"layer{k}": n for k, n in enumerate(noises)}
    price = dict(zip(alone, prices, strict=False))
    trials = 0

    def noise_of(names: Sequence[str]) -> float:
        nonlocal trials
        trials += 1
        return sum(alone[n] for n in names)

    found = keep(list(alone), budget, noise_of, lambda names: {n: alone[n] for n in names}, price.__getitem__)
    assert noise_of(found.names) <= budget or not found.names
    assert found.noise == noise_of(found.names)
    assert sorted([*found.names, *found.restored]) == sorted(alone)
    assert [n for n in alone if n in found.names] == found.names
    assert all(found.restored[n] == alone[n] for n in found.restored)
    if found.restored:
        assert sum(noises) > budget
        least = min(found.restored, key=lambda n: alone[n])
        assert len(found.restored) == 1 or noise_of([*found.names, least]) > budget * (1 - 1e-9)
    # One search by bisection, one by halving: not a trial for every choice.
    assert trials < 20


def test_a_layer_that_does_not_get_on_with_another_does_not_keep_the_rest_out() -> None:
    """Noise that does not add up: ``a`` and ``b`` together are the trouble, whatever else is changed."""
    names = list("abcdefghij")
    alone = {name: 0.01 * (k + 1) for k, name in enumerate(names)}

    def noise_of(chosen: Sequence[str]) -> float:
        return 1.0 if {"a", "b"} <= set(chosen) else 0.0

    found = keep(names, 0.5, noise_of, lambda _: alone)
    assert len(found.restored) == 1
    assert found.restored.keys() <= {"a", "b"}


@pytest.mark.parametrize("count", [1, 2, 7, 12, 43, 44, 100])
def test_a_few_samples_do_not_judge_alone(count: int) -> None:
    samples = Data("numbers", count, lambda k: {"x": np.array(k)}, [])
    fit, judges = ([int(s["x"]) for s in part] for part in parts(samples))
    assert len(judges) >= min(ALONE, count)
    assert judges == list(range(count)) or not set(fit) & set(judges)
    assert (judges == list(range(count))) == (count < 44)
    assert sorted({*fit, *judges}) == list(range(count))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 999), st.integers(1, 12), st.floats(0.0, 0.2), st.booleans())
def test_samples_that_cannot_change_the_verdict_are_not_run(seed: int, count: int, budget: float, first: bool) -> None:
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal((count, 2, 9)).astype(np.float32)
    gains = dict(zip("abcd", rng.uniform(0, 0.3, (4, count)), strict=True))
    runs = 0

    def run(feed: dict[str, np.ndarray], chosen: Collection[str]) -> list[np.ndarray]:
        nonlocal runs
        runs += 1
        k = int(feed["x"])
        return [out * np.float32(1 + sum(gains[name][k] for name in chosen)) for out in exact[k]]

    data = Data("numbers", count, lambda k: {"x": np.array(k)}, [InputSpec("x", np.dtype(np.int64), ())])
    judge = Judge(run, data, 1.0, Context(data), budget)
    if first:
        judge.hardest_first("abcd")
    for chosen in ("abcd", "ab", "c", "ba"):
        want = noise([(list(exact[k]), run({"x": np.array(k)}, chosen)) for k in range(count)], DOUBT)
        before = runs
        found = judge.noise(chosen)
        assert (found <= budget) == (want <= budget)
        assert found == pytest.approx(want) if want <= budget else found <= want * (1 + 1e-9)
        assert runs - before <= count
        assert chosen != "ba" or runs == before


def _halves(outputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The first half of each output is of one kind, the rest of another."""
    return [half for array in outputs for half in np.array_split(array, 2)]


def test_small_numbers_do_not_hide_behind_large_ones() -> None:
    rng = np.random.default_rng(0)
    boxes, scores = 100 * rng.standard_normal(50), rng.standard_normal(50)

    def run(_: dict[str, np.ndarray], chosen: Collection[str]) -> list[np.ndarray]:
        return [np.concatenate([boxes, scores * (0.5 if chosen else 1)])]

    data = Data("numbers", 4, lambda k: {"x": np.array(k)}, [InputSpec("x", np.dtype(np.int64), ())])
    ways = (None, lambda _, outputs: Exact(outputs, _halves))
    lost = [Judge(run, data, 1.0, Context(data), np.inf, exact).noise("a") for exact in ways]
    want = np.sum((0.5 * scores) ** 2) / np.sum((scores - scores.mean()) ** 2) / KIND
    assert lost[0] < 1e-3
    assert lost[1] == pytest.approx(want, rel=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.integers(1, 300), st.floats(1e-4, 1.0))
def test_ranking_keeps_to_the_work_and_finds_the_worst(seed: int, count: int, part: float) -> None:
    """One layer makes as much noise as all others together; noise adds up."""
    rng = np.random.default_rng(seed)
    names = [f"layer{k}" for k in range(count)]
    made = dict(zip(names, rng.uniform(0, 1, count), strict=True))
    worst = names[int(rng.integers(count))]
    made[worst] = sum(made.values()) + 1
    exact = rng.standard_normal(4000).astype(np.float32)
    error = rng.standard_normal(4000).astype(np.float32) * np.float32(1e-2)
    runs = 0

    def run(_: dict[str, np.ndarray], chosen: Collection[str]) -> list[np.ndarray]:
        nonlocal runs
        runs += 1
        return [exact + error * np.float32(np.sqrt(sum(made[n] for n in chosen)))]

    data = Data("numbers", 8, lambda k: {"x": np.array(k)}, [InputSpec("x", np.dtype(np.int64), ())])
    work = WORK / max(part * count, 1)  # so much for a run
    judge = Judge(run, data, work, Context(data), np.inf)
    runs = 0
    found = judge.rank(names)
    assert sorted(found) == sorted(names)
    assert runs <= max(int(WORK / work), RUNS)
    assert max(found, key=found.__getitem__) == worst
    assert found[worst] > 0.9 * judge.noise([worst])
    assert sum(found.values()) == pytest.approx(sum(judge.noise([n]) for n in names), rel=0.2)
