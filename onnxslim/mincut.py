"""Minimum cut of a graph with integer capacities."""

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

        Dinic's algorithm: flow is sent along all shortest paths at once, phase by phase; with unit capacities a phase
        is linear in the edges, and phases are as many as there are lengths of paths. The network is used up by it.
        """
        total = 0
        while True:
            levels = self._levels(source)
            if sink not in levels:
                return total, set(levels)
            edges = {
                vertex: [n for n in self._capacity[vertex] if levels.get(n) == level + 1]
                for vertex, level in levels.items()
            }
            while flow := self._augment(source, sink, edges):
                total += flow

    def _levels(self, source: Hashable) -> dict[Hashable, int]:
        """Vertices that the remaining capacities lead to, with the number of steps."""
        levels: dict[Hashable, int] = {source: 0}
        queue = deque([source])
        while queue:
            vertex = queue.popleft()
            for neighbour, capacity in self._capacity.get(vertex, {}).items():
                if capacity > 0 and neighbour not in levels:
                    levels[neighbour] = levels[vertex] + 1
                    queue.append(neighbour)
        return levels

    def _augment(self, source: Hashable, sink: Hashable, edges: dict[Hashable, list[Hashable]]) -> int:
        """Send flow along one shortest path; an edge that leads nowhere in this phase leaves ``edges``."""
        path = [source]
        while path[-1] != sink:
            remaining, ahead = self._capacity[path[-1]], edges[path[-1]]
            while ahead and not remaining[ahead[-1]]:
                ahead.pop()
            if ahead:
                path.append(ahead[-1])
            elif len(path) == 1:
                return 0
            else:
                path.pop()
                edges[path[-1]].pop()
        flow = min(self._capacity[a][b] for a, b in itertools.pairwise(path))
        for a, b in itertools.pairwise(path):
            self._capacity[a][b] -= flow
            self._capacity[b][a] += flow
        return flow
