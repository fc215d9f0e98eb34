"""What a plan leaves of parameters, MACs and milliseconds, counted without building it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import cost, runtime
from onnxslim.channels import Labels
from onnxslim.contract import Context
from onnxslim.coupling import Coupling, Family
from onnxslim.graph import is_constant, walk

Share = list[tuple[float, tuple[int, ...]]]  # parts of an axis, each with the families that can remove positions of it


@dataclasses.dataclass
class Term:
    """An amount that is proportional to the sizes of some axes."""

    amount: float
    axes: list[Share]

    def left(self, kept: Sequence[float]) -> float:
        """The amount when the share ``kept[k]`` of family k stays."""
        total = self.amount
        for share in self.axes:
            total *= sum(part * math.prod(kept[k] for k in who) for part, who in share)
        return total


class Budget:
    """A quantity of the whole model as a function of how many units leave each family."""

    def __init__(self, families: Sequence[Family], terms: Sequence[Term], total: float) -> None:
        self._counts = [len(f.atoms) for f in families]
        self._terms = [t for t in terms if t.axes and t.amount > 0]
        self.total = total
        self._fixed = total - sum(t.amount for t in self._terms)

    def __call__(self, removed: Sequence[float]) -> float:
        kept = [1 - m / n for m, n in zip(removed, self._counts, strict=True)]
        return self._fixed + sum(t.left(kept) for t in self._terms)


class Shapes:
    """Which share of each labelled axis each family can remove."""

    def __init__(self, coupled: Coupling, families: Sequence[Family]) -> None:
        self._coupled = coupled
        root = coupled.solution.root
        self._member = np.zeros((len(families), len(root)), bool)
        for k, family in enumerate(families):
            self._member[k] = coupled.solution.removed(family.atoms)
        self._known: dict[int, Share] = {}

    def share(self, labels: Labels | None) -> Share | None:
        """The parts of an axis, None when nothing of it can leave."""
        if labels is None or not len(labels):
            return None
        key = id(labels)
        if key not in self._known:
            patterns, counts = np.unique(self._member[:, labels].T, axis=0, return_counts=True)
            self._known[key] = [
                (float(n) / len(labels), tuple(np.flatnonzero(p).tolist()))
                for p, n in zip(patterns, counts, strict=True)
            ]
        found = self._known[key]
        return found if any(who for _, who in found) else None

    def axes(self, value: ir.Value) -> list[Share]:
        """The parts of every axis of a tensor that can be cut."""
        labels = self._coupled.labels.get(value, [])
        return [s for x in labels if (s := self.share(x)) is not None]


def parameters(coupled: Coupling, families: Sequence[Family], shapes: Shapes) -> Budget:
    """Elements of the weights."""
    terms = [
        Term(float(value.const_value.size), shapes.axes(value))
        for value in coupled.labels
        if is_constant(value) and value.const_value is not None
    ]
    return Budget(families, terms, float(cost.parameters(coupled.model)))


def macs(coupled: Coupling, families: Sequence[Family], shapes: Shapes, feed: Mapping[str, np.ndarray]) -> Budget:
    """Multiplications for one sample."""
    counted = {row.name: row.macs for row in cost.analyze(coupled.model, feed).table if row.macs}
    terms: list[Term] = []
    for node in walk(coupled.model.graph):
        amount = counted.get(node.name or next((v.name for v in node.outputs if v.name), "") or node.op_type, 0)
        terms.extend(_work(node, float(amount), coupled, shapes))
    return Budget(families, terms, float(sum(counted.values())))


def milliseconds(
    coupled: Coupling, families: Sequence[Family], shapes: Shapes, removals: Sequence[Sequence[int]], ctx: Context,
    pruned: Sequence[ir.Model],
) -> Budget:  # fmt: skip
    """Time of one sample, from kernel times measured on narrower models: per node a + b * (share of its work left).

    Args:
        removals: units that leave each family in the models ``pruned``.
    """
    feeds = [ctx.calibration.feed(ctx.calibration[0])]
    nodes = list(walk(coupled.model.graph))
    names = {v.name: node for node in nodes for v in node.outputs}
    names.update({node.name: node for node in nodes if node.name})
    times = [_per_node(runtime.profile(m, feeds, threads=ctx.threads), names) for m in (coupled.model, *pruned)]
    total = sum(times[0].values())
    counts = [len(f.atoms) for f in families]
    kept = [[1.0] * len(counts), *([1 - m / n for m, n in zip(r, counts, strict=True)] for r in removals)]
    terms: list[Term] = []
    for node, full in times[0].items():
        if node is None:
            continue
        parts = _work(node, 1.0, coupled, shapes)
        left = np.array([sum(t.left(k) for t in parts) for k in kept])
        spent = np.array([t.get(node, full) for t in times])
        moved = 1 - left
        if moved.max() < 1e-6:
            continue
        # Least squares through the time of the full width; nothing is saved beyond the node's own time.
        slope = float(np.clip(np.sum(moved * (full - spent)) / np.sum(moved**2), 0.0, full))
        terms.extend(Term(slope * t.amount, t.axes) for t in parts)
    return Budget(families, terms, total)


def _per_node(times: Mapping[str, float], names: Mapping[str | None, ir.Node]) -> dict[ir.Node | None, float]:
    """Times by node; what cannot be told apart under None."""
    result: dict[ir.Node | None, float] = {}
    for name, time in times.items():
        node = names.get(name)
        result[node] = result.get(node, 0.0) + time
    return result


def _work(node: ir.Node, amount: float, coupled: Coupling, shapes: Shapes) -> list[Term]:
    """``amount`` in proportion to what a node computes: its weights where it multiplies by some, else its output."""
    factors = node.inputs[: 3 if node.op_type in ("LSTM", "GRU", "RNN") else 2]
    weights = [
        v for v in factors if v is not None and is_constant(v) and v.const_value is not None
        and len(v.const_value.shape) > 1 and v.const_value.size and v in coupled.labels
    ]  # fmt: skip
    if weights:
        sizes = [float(v.const_value.size) for v in weights if v.const_value is not None]
        return [Term(amount * s / sum(sizes), shapes.axes(v)) for v, s in zip(weights, sizes, strict=True)]
    axes = shapes.axes(node.outputs[0])
    for site in coupled.sites:
        if site.node is node and (inner := shapes.share(site.labels)) is not None:
            axes = [*axes, inner]
    return [Term(amount, axes)]


__all__ = ["Budget", "Shapes", "Term", "macs", "milliseconds", "parameters"]
