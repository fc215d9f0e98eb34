"""Channel coupling: which slices of which tensors can only be removed together.

Every index of every axis of every tensor gets an *id*, a boolean variable that says "this slice is removed".
Operators tie ids by three kinds of statements, collected by `Ids` and solved once for the whole graph:

* ``tie(x, y)``: x and y are removed together (elementwise operators, contracted axes, biases).
* ``define(x, [a, b])``: x is removed exactly when a or b is. An axis that is a product of two, such as the 768 columns
  that a Reshape views as 12 heads of 64, is removed by heads or by positions within the heads; grouped convolutions
  and repeated key-value heads have the same form.
* ``freeze(x, reason)``: x stays.

Ids without a definition are *atoms*. Any set of atoms that avoids the frozen ones can be removed, and everything
that has to leave with it follows from the definitions. Every statement is a restriction, so adding one is always sound.

What the statements mean for a graph, and how each operator makes them, is in `onnxslim.coupling`; `onnxslim.surgery`
removes the slices. The idea of coupled groups is DepGraph's (Fang et al., arXiv:2301.12900).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components

Labels = np.ndarray  # ids of one axis, int64 (n,)
FROZEN = 0  # the id of everything that stays


class Ids:
    """Collects statements about ids; `solve` turns them into atoms."""

    def __init__(self) -> None:
        self.count = 1
        self._ties: list[np.ndarray] = []  # (2, n) pairs
        self._definitions: list[np.ndarray] = []  # (1 + parts, n): x, then its parts
        self._reasons: list[tuple[np.ndarray, str]] = []

    def new(self, n: int) -> Labels:
        """Mint ``n`` ids."""
        labels = np.arange(self.count, self.count + n)
        self.count += n
        return labels

    def tie(self, x: Labels, y: Labels) -> None:
        """x[k] and y[k] are removed together."""
        if x is not y:
            self._ties.append(np.stack([x, y]))

    def define(self, x: Labels, parts: Sequence[Labels]) -> None:
        """x[k] is removed exactly when one of parts[0][k], parts[1][k], ... is."""
        if len(parts) == 1:
            self.tie(x, parts[0])
        else:
            self._definitions.append(np.stack([x, *parts]))

    def freeze(self, x: Labels, reason: str) -> None:
        """x[k] stays; ``reason`` is what the user reads, naming the node."""
        if len(x):
            self._reasons.append((x, reason))

    def solve(self) -> Solution:
        """Resolve all statements; see `Solution`."""
        frozen = [np.stack([np.full(len(x), FROZEN), x]) for x, _ in self._reasons]
        root = _components(self.count, [*self._ties, *frozen])
        definitions = _stack(self._definitions)
        while True:
            implied, remaining = _implications(root[definitions], root[FROZEN])
            if not implied.size:
                break
            # Components of components: the ties found so far are already in `root`.
            root = _components(self.count, [implied])[root]
            definitions = remaining
        return Solution(root, remaining, self._why())

    def _why(self) -> list[tuple[np.ndarray, str]]:
        """For every frozen set of ids that is tied without passing through FROZEN: the first reason given."""
        component = _components(self.count, self._ties)
        reason_of: dict[int, str] = {}
        for x, reason in self._reasons:
            for root in np.unique(component[x]):
                reason_of.setdefault(int(root), reason)
        by_reason: dict[str, list[int]] = {}
        for root, reason in reason_of.items():
            by_reason.setdefault(reason, []).append(root)
        return [(np.flatnonzero(np.isin(component, roots)), reason) for reason, roots in by_reason.items()]


@dataclasses.dataclass
class Solution:
    """The solved statements.

    Attributes:
        root: representative of each id, (ids,).
        definitions: (1 + parts, n) in representatives, padded with the frozen one; column 0 is removed when any
            other row's id is.
        reasons: (ids, reason) pairs of what was frozen directly.
    """

    root: np.ndarray
    definitions: np.ndarray
    reasons: list[tuple[np.ndarray, str]]

    def __post_init__(self) -> None:
        self._edges = _edges(self.definitions, len(self.root), int(self.root[FROZEN]))
        self._parts: dict[int, tuple[int, ...]] = {}  # the positions at which an id is part of something
        for k, part in enumerate(self.definitions[1:]):
            for x in np.unique(part).tolist():
                self._parts[x] = (*self._parts.get(x, ()), k)

    def removed(self, atoms: np.ndarray) -> np.ndarray:
        """Which ids leave when ``atoms`` do: bool (ids,)."""
        gone = np.zeros(len(self.root), bool)
        gone[atoms] = True
        while True:
            more = gone | (self._edges @ gone)
            if (more == gone).all():
                return gone[self.root]
            gone = more

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Carry numbers >= 0 from atoms to all that they remove, -1 elsewhere: (ids,), the largest where several meet.

        ``values`` is (ids,), -1 except at the atoms concerned.
        """
        x, parts = self.definitions[0], self.definitions[1:]
        while True:
            more = values.copy()
            for part in parts:
                np.maximum.at(more, x, values[part])
            if (more == values).all():
                return values[self.root]
            values = more

    def atoms(self, labels: Labels) -> np.ndarray:
        """The atoms (sorted, without the frozen one) whose removal removes something on this axis."""
        found = np.unique(self.root[labels])
        while True:
            parts = self._edges[found].indices
            more = np.union1d(found, parts)
            if len(more) == len(found):
                break
            found = more
        defined = np.unique(self.definitions[0]) if self.definitions.size else np.empty(0, np.int64)
        return np.setdiff1d(found, np.append(defined, self.root[FROZEN]))

    def roles(self, labels: Labels) -> dict[int, tuple[int, ...]]:
        """For each atom of this axis, what tells it from others: in how many ways it removes, and as which part.

        Heads and positions within the heads are both atoms of an axis of heads x positions, and no two of them can take
        each other's place.
        """
        atoms = self.atoms(labels)
        ways = np.bincount(self.root[labels], minlength=len(self.root))
        total = ways.copy()
        for _ in range(len(self.definitions.T)):  # definitions of definitions: as many rounds as they are nested
            ways = self._edges.T @ ways
            if not ways.any() or total.max() > 1 << 40:  # the latter where they define each other
                break
            total += ways
        return {int(atom): (int(total[atom]), *self._parts.get(int(atom), ())) for atom in atoms}

    def is_frozen(self, labels: Labels) -> np.ndarray:
        """Which ids can never leave: bool, the shape of ``labels``."""
        return self.root[labels] == self.root[FROZEN]

    def reason(self, labels: Labels) -> str:
        """Why the frozen ids among ``labels`` stay: the first reason that applies to any of them."""
        stuck = labels[self.is_frozen(labels)]
        for ids, reason in self.reasons:
            if np.isin(stuck, ids).any():
                return reason
        return "tied to a slice that must stay"


def _components(count: int, ties: Sequence[np.ndarray]) -> np.ndarray:
    """Representative (the smallest id) of every id's component."""
    if not ties:
        return np.arange(count)
    pairs = np.concatenate(ties, axis=1)
    graph = coo_array((np.ones(pairs.shape[1], bool), (pairs[0], pairs[1])), shape=(count, count))
    _, label = connected_components(graph, directed=False)
    _, first = np.unique(label, return_index=True)
    return np.asarray(first[label], np.int64)


def _stack(definitions: Sequence[np.ndarray]) -> np.ndarray:
    """All definitions as one array, short ones padded with FROZEN, which removes nothing."""
    rows = max((len(d) for d in definitions), default=2)
    padded = [np.pad(d, ((0, rows - len(d)), (0, 0)), constant_values=FROZEN) for d in definitions]
    return np.concatenate([np.empty((rows, 0), np.int64), *padded], axis=1).astype(np.int64)


def _implications(definitions: np.ndarray, frozen: int) -> tuple[np.ndarray, np.ndarray]:
    """Ties that follow from ``definitions`` (in representatives), and the definitions that still say something more.

    * x frozen: all its parts are. * Every part frozen: x is. * One part left: x is that part.
    * x among its own parts: the other parts would remove x without being removed by it: they are frozen.
    * Two definitions of the same x: their parts are tied position by position; what only one of them has is frozen.
    """
    if not definitions.size:
        return np.empty((2, 0), np.int64), definitions
    x, parts = definitions[0], definitions[1:]
    # A part that is there twice counts once. Positions are kept: they are what two definitions are compared by.
    parts = parts.copy()
    for k in range(1, len(parts)):
        parts[k][(parts[:k] == parts[k]).any(axis=0)] = frozen
    definitions = np.unique(np.concatenate([x[None], parts]), axis=1)
    x, parts = definitions[0], definitions[1:]
    live = (parts != frozen).sum(axis=0)
    ties = []

    def tie(a: np.ndarray, b: np.ndarray) -> None:
        different = a != b
        if different.any():
            ties.append(np.stack([a[different], b[different]]))

    stuck = x == frozen
    own = (parts == x).any(axis=0) & ~stuck & (live > 1)
    for part in parts:
        tie(part[stuck], np.full(int(stuck.sum()), frozen))
        others = own & (part != x)
        tie(part[others], np.full(int(others.sum()), frozen))
    tie(x[live == 0], np.full(int((live == 0).sum()), frozen))
    tie(x[live == 1], parts.max(axis=0)[live == 1])  # FROZEN is the smallest id
    # np.unique sorted by x: the first definition of every x is the one that the others are compared with.
    first = np.searchsorted(x, x)
    repeated = (first != np.arange(len(x))) & ~stuck
    for part, reference in zip(parts, parts[:, first], strict=True):
        tie(part[repeated], reference[repeated])
    keep = (live > 1) & ~stuck & ~own
    implied = np.concatenate(ties, axis=1) if ties else np.empty((2, 0), np.int64)
    return implied, definitions[:, keep]


def _edges(definitions: np.ndarray, count: int, frozen: int) -> csr_array:
    """Sparse (count, count): row x has its parts."""
    x = np.repeat(definitions[:1], len(definitions) - 1, axis=0).ravel()
    parts = definitions[1:].ravel()
    real = parts != frozen
    return csr_array((np.ones(int(real.sum()), bool), (x[real], parts[real])), shape=(count, count))
