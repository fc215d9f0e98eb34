"""The common refinement of the axes that a tensor has before and after views and Transposes."""

from __future__ import annotations

from collections.abc import Sequence

from onnxslim import symbolic
from onnxslim.symbolic import Dim


class Atoms:
    """The axes of a tensor as lists of atoms, which `view` cuts further; an axis of size 1 has none.

    Atoms are numbered; ``size`` gives their sizes. ``source`` keeps the axes of the tensor that it began with, cut in
    the same way.
    """

    def __init__(self, shape: Sequence[Dim]) -> None:
        self.size: dict[int, Dim] = {}
        self.source = [[] if dim == 1 else [self._new(dim)] for dim in shape]
        self.axes = [list(axis) for axis in self.source]

    def _new(self, size: Dim) -> int:
        self.size[len(self.size)] = size
        return len(self.size) - 1

    def transpose(self, perm: Sequence[int]) -> None:
        """Bring the axes into another order."""
        self.axes = [self.axes[p] for p in perm]

    def view(self, shape: Sequence[Dim]) -> bool:
        """Group the atoms into the axes of ``shape``; False where the two have no common refinement."""
        waiting = [atom for axis in self.axes for atom in axis][::-1]
        axes: list[list[int]] = []
        for dim in shape:
            axis: list[int] = []
            left: Dim = dim
            while left != 1:
                if not waiting:
                    return False
                atom = waiting.pop()
                size = self.size[atom]
                rest = symbolic.quotient([left], [size])
                if rest is None:
                    rest = symbolic.quotient([size], [left])
                    if rest is None:
                        return False
                    atom, other = self._cut(atom, left, rest)
                    waiting.append(other)
                    rest = 1
                axis.append(atom)
                left = rest
            axes.append(axis)
        # The cuts made on the way apply to the axes that are done as well as to the source.
        self.axes = axes
        return not waiting

    def _cut(self, atom: int, first: Dim, second: Dim) -> tuple[int, int]:
        parts = self._new(first), self._new(second)
        for axis in (*self.source, *self.axes):
            if atom in axis:
                k = axis.index(atom)
                axis[k : k + 1] = parts
        return parts
