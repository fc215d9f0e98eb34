"""The minimum cut against all cuts of small random networks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxslim.mincut import Network


@pytest.mark.parametrize("seed", range(30))
def test_the_cut_is_the_cheapest_of_all_and_its_side_the_smallest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 7))
    edges = [(a, b, int(rng.integers(1, 4))) for a, b in itertools.permutations(range(count), 2) if rng.random() < 0.5]
    network = Network()
    network.add(0, 1, 0)
    for a, b, capacity in edges:
        network.add(a, b, capacity)
    value, side = network.cut(0, 1)

    def cost(chosen: set[int]) -> int:
        return sum(capacity for a, b, capacity in edges if a in chosen and b not in chosen)

    others = range(2, count)
    cuts = [{0, *extra} for size in range(count - 1) for extra in itertools.combinations(others, size)]
    best = min(map(cost, cuts))
    assert value == best == cost(side)
    assert all(side <= cut for cut in cuts if cost(cut) == best)
