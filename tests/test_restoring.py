"""`restoring`: what goes back so that the rest is borne, on noise that adds up; which samples judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxslim.data import Data
from onnxslim.restoring import ALONE, keep, parts


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
