"""Minimum cut of a small graph with integer capacities."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Hashable

INFINITE = 1 << 40


class Network:
    """Edges with capacities; ``add`` the same edge twice and the capacities add up."""

    def __init__(self) -> None:
        self._capacity: dict[Hashable, dict[Hashable, int]] = {}

    def add(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """Add an edge."""
        forward = self._capacity.setdefault(start, {})
        forward[end] = forward.get(end, 0) + capacity
        self._capacity.setdefault(end, {}).setdefault(start, 0)

    def cut(self, source: Hashable, sink: Hashable) -> tuple[int, set[Hashable]]:
        """Value of the minimum cut, and the smallest set of vertices on the side of ``source`` that attains it.

        Augments along shortest paths: (edges) x (value of the cut) steps where all finite capacities are 1. The
        network is used up by it.
        """
        total = 0
        while True:
            parents = self._reach(source, sink)
            if sink not in parents:
                return total, set(parents)
            path = [sink]
            while path[-1] != source:
                path.append(parents[path[-1]])
            path.reverse()
            flow = min(self._capacity[a][b] for a, b in itertools.pairwise(path))
            for a, b in itertools.pairwise(path):
                self._capacity[a][b] -= flow
                self._capacity[b][a] += flow
            total += flow

    def _reach(self, source: Hashable, sink: Hashable) -> dict[Hashable, Hashable]:
        """Vertices that the remaining capacities lead to, each with the one before it; stops at ``sink``."""
        parents: dict[Hashable, Hashable] = {source: source}
        queue = deque([source])
        while queue:
            vertex = queue.popleft()
            for neighbour, capacity in self._capacity.get(vertex, {}).items():
                if capacity > 0 and neighbour not in parents:
                    parents[neighbour] = vertex
                    if neighbour == sink:
                        return parents
                    queue.append(neighbour)
        return parents
