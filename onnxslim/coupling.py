"""How every operator ties the channels of its inputs, outputs and weights.

`analyze` walks the graph once and states, per operator, which axes are tied (see `onnxslim.channels`), where channels
are contracted (summed over: the only places where a removed channel could still be felt), and which constants and
attributes have to change when channels leave. An operator without a rule freezes what it touches and says so.

The oracle that holds for everything found here: multiplying the contracted inputs by a 0/1 mask in the original graph
(`mask`) gives the same outputs as removing the masked channels (`Coupling.remove`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import branch_values, runtime
from onnxslim.channels import Ids, Labels, Solution
from onnxslim.errors import ModelError
from onnxslim.graph import (
    add_constant,
    add_node,
    by_output,
    captured,
    constant,
    is_constant,
    is_op,
    set_constant,
    subgraphs,
)  # fmt: skip

Axes = list[Labels | None]  # one entry per axis; None: the axis cannot be cut
Rule = Callable[["Coupling", ir.Node], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A contraction: ``node`` sums over axis ``axis`` of input ``data``.

    ``weight`` is the input index of the constant factor and ``weight_axis`` its contracted axis; -1 where the other
    factor is computed at run time. ``labels`` are the ids of the contracted axis, (n,). ``groups`` > 1 for grouped
    convolutions, whose weight holds n / groups input channels; ``rank`` that of the data. ``source`` is the value that
    is summed over where it is no input: a recurrent layer sums over its own output.
    """

    node: ir.Node
    data: int
    axis: int
    labels: Labels
    weight: int = -1
    weight_axis: int = -1
    groups: int = 1
    rank: int = 0
    source: ir.Value | None = None

    @property
    def operand(self) -> ir.Value | None:
        """The value that is summed over."""
        return self.source if self.source is not None else self.node.inputs[self.data]

    @property
    def name(self) -> str:
        return self.node.name or self.node.outputs[0].name or self.node.op_type


@dataclasses.dataclass
class Family:
    """Interchangeable units of removal: atoms that appear on exactly the same axes, in the same role.

    Attributes:
        name: the first tensor that carries them, with "#2" and so on behind it where several families share that one.
        atoms: (n,) ids.
        sites: contractions that feel their removal.
        weights: constants that shrink, each with the axis.
    """

    name: str
    atoms: np.ndarray
    sites: list[Site]
    weights: list[tuple[ir.Value, int]]


class Coupling:
    """The statements about one model; built by `analyze`."""

    def __init__(self, model: ir.Model, shapes: Mapping[str, tuple[int, ...]], small: Mapping[str, np.ndarray]) -> None:
        self.model = model
        self.ids = Ids()
        self.sites: list[Site] = []
        self.labels: dict[ir.Value, Axes] = {}
        self.targets: dict[ir.Node, dict[int, tuple[Labels | None, str]]] = {}
        self.shapes = shapes
        self._small = small
        self._elastic: set[int] = set()
        self._edits: list[Callable[[Callable[[Labels], np.ndarray]], None]] = []
        self._solution: Solution | None = None

    # What rules ask.

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """The shape seen when the model ran on a sample."""
        if value.const_value is not None and value.is_initializer():
            return tuple(value.const_value.shape.numpy())
        return self.shapes[value.name or ""]

    def argument(self, value: ir.Value | None) -> np.ndarray | None:
        """The content of an integer argument (a shape, indices): constant, or as seen on the sample."""
        if value is None:
            return None
        found = constant(value)
        return found if found is not None else self._small.get(value.name or "")

    def axes(self, value: ir.Value) -> Axes:
        """The labels of ``value``; an initializer gets new ones when first asked for."""
        if value not in self.labels:
            # int64 and bool constants are shapes, indices and masks: data about the graph, not channels.
            fresh = is_constant(value) and value.dtype not in (ir.DataType.INT64, ir.DataType.BOOL)
            self.labels[value] = [self.ids.new(n) if fresh and n > 1 else None for n in self.shape(value)]
        return self.labels[value]

    def is_elastic(self, value: ir.Value | None, axis: int, labels: Labels | None) -> bool:
        """True when the length of an axis may differ between samples: its labels then describe one sample only.

        Labels are told by how they were made; an axis without labels by the declared shape of ``value``.
        """
        if labels is not None:
            return len(labels) > 0 and int(labels[0]) in self._elastic
        return value is not None and not isinstance(_declared(value, len(self.shape(value)))[axis], int)

    # What rules say.

    def mark_elastic(self, labels: Labels) -> None:
        """Record that an axis of another sample may be longer or shorter; see `is_elastic`."""
        self._elastic.update(labels.tolist())

    def tie(self, x: Labels | None, y: Labels | None, reason: str) -> Labels | None:
        """Tie two axes; where one cannot be cut, the other is frozen for ``reason``. Returns the labels of both."""
        if x is None or y is None:
            self.freeze(x, reason)
            self.freeze(y, reason)
            return None
        self.ids.tie(x, y)
        return x

    def freeze(self, x: Labels | None, reason: str) -> None:
        """Keep every index of an axis."""
        if x is not None:
            self.ids.freeze(x, reason)

    def freeze_value(self, value: ir.Value | None, reason: str) -> None:
        """Keep every index of every axis of a tensor."""
        if value is not None and (value in self.labels or is_constant(value)):
            for labels in self.axes(value):
                self.freeze(labels, reason)

    def set(self, value: ir.Value, axes: Axes) -> None:
        """Label an output; axes of size 1 are never cut."""
        shape = self.shape(value)
        self.labels[value] = [None if n < 2 else labels for n, labels in zip(shape, axes, strict=True)]

    def target(self, node: ir.Node, entry: int, labels: Labels | None, reason: str) -> None:
        """Record that in the sizes that ``node`` gives its output, ``entry`` is read from an axis with ``labels``.

        The rule of ``node`` takes it out of `targets` and ties the axes; what is left there in the end is frozen.
        """
        self.targets.setdefault(node, {})[entry] = labels, reason

    def contract(self, node: ir.Node, data: int, axis: int, weight: int, weight_axis: int, groups: int = 1) -> None:
        """Record that ``node`` sums over an axis of input ``data``; the other factor is input ``weight``."""
        value = node.inputs[data]
        assert value is not None
        labels = self.axes(value)[axis]
        if labels is None:
            return
        fixed = is_constant(node.inputs[weight])
        self.sites.append(
            Site(
                node,
                data,
                axis,
                labels,
                weight if fixed else -1,
                weight_axis if fixed else -1,
                groups,
                len(self.shape(value)),
            )
        )

    def edit(self, change: Callable[[Callable[[Labels], np.ndarray]], None]) -> None:
        """Register what else changes on removal; ``change`` is given a function labels -> bool, kept or not."""
        self._edits.append(change)

    # What passes ask.

    @property
    def solution(self) -> Solution:
        """The solved statements."""
        if self._solution is None:
            self._solution = self.ids.solve()
        return self._solution

    @functools.cached_property
    def families(self) -> list[Family]:
        """Everything that can be removed, in the order in which the graph computes it."""
        places: dict[int, list[tuple[int, int, tuple[int, ...]]]] = {}
        weights = [v for v in self.labels if is_constant(v)]
        axes = [(k, a, x) for k, v in enumerate(weights) for a, x in enumerate(self.labels[v]) if x is not None]
        axes += [(-1 - k, 0, site.labels) for k, site in enumerate(self.sites)]
        for k, axis, carried in axes:
            for atom, role in self.solution.roles(carried).items():
                places.setdefault(atom, []).append((k, axis, role))
        first: dict[int, str] = {}
        for value, value_axes in self.labels.items():
            if is_constant(value):
                continue
            for labels in value_axes:
                if labels is not None:
                    for atom in self.solution.atoms(labels).tolist():
                        first.setdefault(atom, value.name or "")
        together: dict[tuple[tuple[int, int, tuple[int, ...]], ...], list[int]] = {}
        for atom, where in places.items():
            if atom in first:
                together.setdefault(tuple(where), []).append(atom)
        families = [
            Family(
                first[atoms[0]],
                np.array(sorted(atoms)),
                [self.sites[-1 - k] for k, *_ in where if k < 0],
                [(weights[k], axis) for k, axis, _ in where if k >= 0],
            )
            for where, atoms in together.items()
            if len(atoms) > 1 and any(k < 0 for k, *_ in where)
        ]
        order = {name: k for k, name in enumerate(dict.fromkeys(first.values()))}
        families.sort(key=lambda f: (order[f.name], int(f.atoms[0])))
        # Heads and positions within the heads are first carried by the same tensor.
        seen: collections.Counter[str] = collections.Counter()
        for family in families:
            seen[family.name] += 1
            if seen[family.name] > 1:
                family.name = f"{family.name}#{seen[family.name]}"
        return families

    def frozen(self) -> dict[str, str]:
        """Weights that cannot shrink on any axis, with the reason: {initializer name: reason}."""
        result: dict[str, str] = {}
        for value, axes in self.labels.items():
            labelled = [x for x in axes if x is not None]
            if is_constant(value) and labelled and all(self.solution.is_frozen(x).all() for x in labelled):
                result[value.name or ""] = self.solution.reason(labelled[0])
        return result

    def removed(self, atoms: np.ndarray) -> Callable[[Labels], np.ndarray]:
        """A function from labels to bool: which of them leave together with ``atoms``."""
        gone = self.solution.removed(atoms)
        return lambda labels: gone[labels]

    def remove(self, atoms: np.ndarray) -> None:
        """Remove ``atoms`` and all that leaves with them from the model, physically and in place."""
        gone = self.solution.removed(atoms)
        if not gone.any():
            return

        def kept(labels: Labels) -> np.ndarray:
            return ~gone[labels]

        for value, axes in self.labels.items():
            for axis, x in enumerate(axes):
                if x is not None and not kept(x).any():
                    raise ModelError(f"removing these channels leaves nothing of axis {axis} of {value.name}")
        for change in self._edits:
            change(kept)
        for value, axes in self.labels.items():
            if not is_constant(value):
                continue
            keep = {axis: kept(x) for axis, x in enumerate(axes) if x is not None and not kept(x).all()}
            if keep:
                array: np.ndarray = np.asarray(constant(value))
                for axis, mask in keep.items():
                    array = np.asarray(np.compress(mask, array, axis=axis))
                set_constant(value, array)
        for value, axes in self.labels.items():
            if is_constant(value):
                continue
            dims = _declared(value, len(axes))
            left = {a: int(kept(x).sum()) for a, x in enumerate(axes) if x is not None and isinstance(dims[a], int)}
            if any(n != dims[a] for a, n in left.items()):
                value.shape = ir.Shape([left.get(a, d) for a, d in enumerate(dims)])


def analyze(model: ir.Model, feeds: Mapping[str, np.ndarray], *, threads: int = 0) -> Coupling:
    """State how the channels of ``model`` are coupled.

    Args:
        feeds: one sample; the shapes seen on it are those that the rules work with.
    """
    # They import this module, and register themselves.
    from onnxslim import rules, rules_movement, rules_reductions  # noqa: F401

    shapes, small, taken = _observe(model, feeds, threads)
    coupling = Coupling(model, shapes, small)
    for value in model.graph.inputs:
        if not value.is_initializer():
            coupling.labels[value] = [None] * len(coupling.shape(value))

    def follow(graph: ir.Graph) -> None:
        for node in graph:
            rule = rules.RULES.get(node.op_type) if node.domain in ("", "ai.onnx", "com.microsoft") else None
            if is_op(node, "If") and not taken.isdisjoint(subgraphs(node)):
                _branches(coupling, node, taken, follow)
            else:
                (rule or unknown)(coupling, node)

    follow(model.graph)
    for sizes in coupling.targets.values():
        for labels, why in sizes.values():
            coupling.freeze(labels, why)
    for value in model.graph.outputs:
        coupling.freeze_value(value, f"graph output {value.name}")
    return coupling


def _declared(value: ir.Value, rank: int) -> Sequence[int | ir.SymbolicDim | None]:
    """The declared dimensions of a tensor of ``rank``; None for each where there are none, or another number of them.

    ONNX Runtime runs models whose outputs declare another rank than they have.
    """
    return list(value.shape) if value.shape is not None and len(value.shape) == rank else [None] * rank


def unknown(c: Coupling, node: ir.Node) -> None:
    """Freeze everything that a node reads, in its subgraphs too; its outputs cannot be cut."""
    why = "channels are not followed through its body" if any(subgraphs(node)) else "no rule for this operator"
    for value in (*node.inputs, *captured(node)):
        c.freeze_value(value, reason(node, why))
    for value in node.outputs:
        if value.name in c.shapes:
            c.labels[value] = [None] * len(c.shape(value))


Masks = Mapping[Site, ir.Value]  # constants that are multiplied onto what a contraction without a weight reads


def add_masks(model: ir.Model, sites: Iterable[Site]) -> dict[Site, ir.Value]:
    """Multiply what each of ``sites``, contractions of computed factors, reads by a constant of ones, in place."""
    nodes = by_output(model.graph)
    masks: dict[Site, ir.Value] = {}
    for site in sites:
        node = nodes[site.node.outputs[0].name or ""]
        value = node.inputs[site.data]
        assert value is not None and value.dtype is not None
        shape = [1] * site.rank
        shape[site.axis] = len(site.labels)
        masks[site] = add_constant(model.graph, f"{value.name}_mask", np.ones(shape, value.dtype.numpy()))
        masked = add_node(model.graph, "Mul", [value, masks[site]], before=node, hint=value.name or "", like=value)
        node.replace_input_with(site.data, masked.outputs[0])
    return masks


def _branches(c: Coupling, node: ir.Node, taken: Collection[ir.Graph], follow: Callable[[ir.Graph], None]) -> None:
    """Follow the branches of an If that the sample takes; what it captures has the same labels inside.

    What another branch reads stays, and so does what any of them returns.
    """
    for branch in subgraphs(node):
        seen = branch in taken and all(v.name in c.shapes for inner in branch for v in inner.outputs if v.name)
        if seen:
            follow(branch)
        for value in branch.outputs if seen else [v for n in branch.all_nodes() for v in n.inputs] + [*branch.outputs]:
            c.freeze_value(
                value, reason(node, "returned by a branch" if seen else "a branch that the sample leaves out")
            )
    for value in node.outputs:
        if value.name in c.shapes:
            c.labels[value] = [None] * len(c.shape(value))


def mask(
    model: ir.Model, sites: Iterable[Site], gone: Callable[[Labels], np.ndarray], masks: Masks | None = None
) -> None:
    """Multiply the contracted inputs by 0 where ``gone``, in place: the model as it would be without these channels.

    ``model`` is the one that was analyzed or a clone of it (nodes are found by name of their first output). A constant
    factor is masked itself; where both are computed, a Mul is inserted, unless ``masks`` has one.
    """
    felt = [site for site in sites if gone(site.labels).any()]
    if masks is None:
        masks = add_masks(model, [site for site in felt if site.weight < 0])
    nodes = by_output(model.graph)
    for site in felt:
        removed = gone(site.labels)
        if site.weight < 0:
            factor = masks[site]
            ones = np.asarray(constant(factor))
            set_constant(factor, ones * (~removed).astype(ones.dtype).reshape(ones.shape))
            continue
        weight = nodes[site.node.outputs[0].name or ""].inputs[site.weight]
        array = constant(weight)
        assert weight is not None and array is not None
        # A weight shared by several nodes has the same channels for all of them: they are all tied through it.
        set_constant(weight, zero_channels(array, site, removed))


def zero_channels(weight: np.ndarray, site: Site, removed: np.ndarray) -> np.ndarray:
    """``weight`` with the factors of the removed input channels set to 0; ``removed`` is bool (n,)."""
    array = weight.copy()
    if site.groups == 1:
        np.moveaxis(array, site.weight_axis, 0)[removed] = 0
        return array
    inner = len(removed) // site.groups
    if site.node.op_type == "ConvTranspose":  # (in, out / groups, ...): the channel is the row
        array[removed] = 0
        return array
    rows = array.reshape(site.groups, -1, *array.shape[1:])
    for group, part in enumerate(removed.reshape(site.groups, inner)):
        rows[group][:, part] = 0
    return rows.reshape(array.shape)


def _observe(
    model: ir.Model, feeds: Mapping[str, np.ndarray], threads: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray], set[ir.Graph]]:
    """Shapes of all values on one sample, the content of the small integer ones, and the branches that are taken."""
    names = [v.name for v in model.graph.inputs if not v.is_initializer() and v.name]
    names += [v.name for node in model.graph for v in node.outputs if v.name and isinstance(v.type, ir.TensorType)]
    names += [v.name for node in model.graph for v in node.outputs if v.name and v.type is None]
    inside = [(v.name or "", {branch for _, branch in around}) for v, around in branch_values.visible(model)]
    feeds = _two_samples(model, feeds)
    tapped = runtime.tap(model, [*names, *(name for name, _ in inside)], [feeds], threads=threads, optimize=False)
    values = {name: array for name, array in next(iter(tapped)).items() if isinstance(array, np.ndarray)}
    taken = {branch for name, around in inside if name in values and values[name].size for branch in around}
    for name, around in inside:
        if not around <= taken:
            values.pop(name, None)
    shapes = {name: np.shape(array) for name, array in values.items()}
    return shapes, {n: a for n, a in values.items() if a.dtype.kind in "iu" and a.size < 1 << 20}, taken


def _two_samples(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``feeds`` with a symbolic batch of 1 made 2 where the model takes it: size 1 would hide how the axis moves."""
    doubled = dict(feeds)
    for value in model.graph.inputs:
        array = doubled.get(value.name or "")
        if array is None or not array.ndim or value.shape is None or not len(value.shape):
            continue
        if not isinstance(value.shape[0], int) and array.shape[0] == 1:
            doubled[value.name or ""] = np.concatenate([array, array])
    try:
        runtime.run(runtime.load(model, threads=1), doubled)
    except ModelError:
        return dict(feeds)
    return doubled


def reason(node: ir.Node, text: str) -> str:
    """``text`` as a reason that names the node."""
    return f"{node.op_type} {node.name or node.outputs[0].name}: {text}"
