"""Samples on their way through a model, so that what was computed once is not computed again.

Work that goes through a network layer by layer asks for values ever further behind. A `Frontier` holds what is alive at
the place it has come to, and only what lies behind it is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import runtime, stages
from onnxslim.data import Data
from onnxslim.graph import is_constant

LIMIT = 512_000_000  # bytes that the values of all samples may take, by the first of them


class Frontier:
    """The values that are alive in front of one node of the main graph, for every sample of ``data``.

    Attributes:
        place: the position of that node; 0 at first, where nothing is held and samples are read from the data.
    """

    def __init__(self, data: Data, *, threads: int = 0) -> None:
        self.place = 0
        self._data = data
        self._threads = threads
        self._held: list[dict[str, np.ndarray]] = []
        self._names: list[str] = []
        self._inputs: list[str] = []

    def advance(self, model: ir.Model, place: int) -> None:
        """Move to the node at ``place``, unless what is alive there is too large or cannot be handed over.

        What lies in front of it must be what it was when the place was reached before, and must stay so.
        """
        for _ in self.tap(model, [], place):
            pass

    def tap(self, model: ir.Model, names: Sequence[str], place: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """The values called ``names`` of each sample; as `runtime.tap`, with all of them alive here or made behind.

        With ``place``, samples move on to there on the way, as in `advance`.
        """
        alive = _alive(model, place) if place > self.place else None
        if alive is None and not names:
            return
        own = {value.name for value in model.graph.inputs}
        moved = [name for name in alive or () if name not in own]
        held: list[dict[str, np.ndarray]] = []
        for k, values in enumerate(self._run(model, list(dict.fromkeys([*names, *moved])))):
            kept = {name: values[name] for name in moved}
            if not k and len(self._data) * sum(array.nbytes for array in kept.values()) > LIMIT:
                alive = None
                if not names:
                    return
            if alive is not None:
                held.append(kept)
                if self.place:
                    self._held[k] = {}  # so that a sample is held at one place only
            yield {name: values[name] for name in names}
        if alive is not None:
            self.place, self._held, self._names = place, held, moved
            self._inputs = [name for name in alive if name in own]

    def _run(self, model: ir.Model, names: Sequence[str]) -> Iterator[dict[str, np.ndarray]]:
        made = [name for name in names if name not in self._takes]
        if not self.place:
            return runtime.tap(model, names, self.feeds(), threads=self._threads)
        if made:
            return runtime.tap(self.part(model, made), names, self.feeds(), threads=self._threads)
        return ({name: feed[name] for name in names} for feed in self.feeds())

    def part(self, model: ir.Model, gives: Sequence[str]) -> ir.Model:
        """``model`` from here on, as far as it makes ``gives``: it takes `feeds`."""
        return stages.part(model, self._takes, gives).model if self.place else model

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """What the part from here on takes, for each sample."""
        if not self.place:
            yield from self._data.feeds()
            return
        for k, values in enumerate(self._held):
            feed = self._data.feed(self._data[k]) if self._inputs else {}
            yield {**values, **{name: feed[name] for name in self._inputs}}

    @property
    def _takes(self) -> list[str]:
        return [*self._names, *self._inputs]


def _alive(model: ir.Model, place: int) -> list[str] | None:
    """Names of what the nodes from ``place`` on read of what is before them; None where not all can be handed over."""
    nodes = list(model.graph)
    before = {value for node in nodes[:place] for value in node.outputs} | set(model.graph.inputs)
    reads = dict.fromkeys(value for node in nodes[place:] for value in stages.reads(node))
    alive = [value for value in reads if value in before and not is_constant(value)]
    if not all(stages.can_pass(value) and value.dtype is not None and _is_plain(value.dtype) for value in alive):
        return None
    return [value.name or "" for value in alive]


def _is_plain(dtype: ir.DataType) -> bool:
    """True for numbers that numpy itself knows."""
    return dtype is not ir.DataType.STRING and dtype.numpy().kind in "fiub" and dtype.bitwidth >= 8
