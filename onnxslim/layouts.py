"""Transposes and Reshapes pushed through the operators that do not mind, wherever that leaves fewer of them.

For a change of form (`onnxslim.storage`), every indifferent node is *turned* (it computes on the outer form) or not. A
tensor that one side makes and the other side reads costs one node, however many read it; the changes at the border cost
nothing on the turned side, nor does one that becomes one with the Transpose beside it. The cheapest choice is a minimum
cut, so the number of changes left is the least there is for that form, and nothing is rewritten unless it falls.
"""

from __future__ import annotations

import onnx_ir as ir

from onnxslim.graph import fresh_name, only_user, replace
from onnxslim.mincut import INFINITE, Network
from onnxslim.shape_rules import Fact, Shape
from onnxslim.shapes import Shapes
from onnxslim.storage import Change, changes, tensors

Region = dict[ir.Node, None]
# Work (edges of the network times changes) above which a region is left as it is.
_MAX_WORK = 20_000_000


def remove_changes(model: ir.Model, shapes: Shapes) -> int:
    """Turn what pays, for every change of form in the main graph; returns the number of nodes saved.

    ``shapes`` has visited every node, and no node is dead.
    """
    found = changes(model, shapes)
    positions = {node: k for k, node in enumerate(model.graph)} if found else {}
    return sum(_Search(change, nodes, positions).run() for change, nodes in found)


class _Search:
    """Regions of indifferent nodes beside the nodes that make or undo one change of form."""

    def __init__(self, change: Change, border: list[ir.Node], positions: dict[ir.Node, int]) -> None:
        self._change = change
        self._border = border
        self._positions = positions
        self._visited: set[ir.Node] = set()

    def run(self) -> int:
        saved = 0
        for node in self._border:
            beside: list[ir.Node | None] = []
            if node.graph is not None and self._change.leads_in(node):
                beside += [use.node for use in node.outputs[0].uses()]
            if node.graph is not None and self._change.leads_out(node) and node.inputs[0] is not None:
                beside.append(node.inputs[0].producer())
            for start in beside:
                if start is not None and self._joins(start):
                    saved += self._turn_best(self._region(start))
        return saved

    def _joins(self, node: ir.Node | None) -> bool:
        return (
            node is not None
            and node not in self._visited
            and node in self._positions
            and self._change.indifferent(node)
        )

    def _region(self, start: ir.Node) -> Region:
        """Indifferent nodes connected with ``start``."""
        region: Region = {start: None}
        stack = [start]
        self._visited.add(start)
        while stack:
            node = stack.pop()
            neighbours = [v.producer() for v in tensors(node)]
            neighbours += [use.node for v in (*tensors(node), *node.outputs) for use in v.uses()]
            for other in neighbours:
                if other is not None and self._joins(other):
                    self._visited.add(other)
                    region[other] = None
                    stack.append(other)
        return region

    def _turn_best(self, region: Region) -> int:
        network, before = self._network(region)
        if network is None:
            return 0
        after, side = network.cut("turned", "kept")
        if after >= before:
            return 0
        self._turn({node: None for node in sorted(region, key=self._positions.__getitem__) if node in side})
        return before - after

    def _network(self, region: Region) -> tuple[Network | None, int]:
        """The cut problem of a region, and how many changes it has as it is."""
        network = Network()
        enter = 1 if self._change.can_enter else INFINITE
        leave = 1 if self._change.can_leave else INFINITE
        before = edges = 0
        for value in dict.fromkeys(v for node in region for v in (*tensors(node), *node.outputs)):
            producer = value.producer()
            inside = [u.node for u in value.uses() if u.node in region and value in tensors(u.node)]
            edges += len(inside) + 2
            made, read = ("made", value), ("read", value)
            if producer is None or (producer not in region and not self._enters(producer, region)):
                merged = self._change.merges(producer) and only_user(value) is not None
                network.add(read, "kept", 0 if merged else leave)
                for node in inside:
                    network.add(node, read, INFINITE)
                continue
            outs = 0
            if producer in region:
                reader = only_user(value)
                merged = reader is not None and reader in self._positions and self._change.merges(reader)
                outward = reader is not None and self._change.leads_out(reader)
                network.add(producer, made, 0 if merged and not outward else enter)
                network.add(read, producer, leave if inside else 1)
                outs = sum(self._change.leads_out(u.node) for u in value.uses())
                if outs:
                    before += 1
                    network.add("turned", read, INFINITE)
                for node in inside:
                    network.add(node, read, INFINITE)
            else:
                before += 1
                network.add("turned", made, 1)
            for node in inside:
                network.add(made, node, INFINITE)
            if len(inside) + outs < len(value.uses()) or value.is_graph_output():
                network.add(made, "kept", INFINITE)
        return (network if before > 1 and edges * before <= _MAX_WORK else None), before

    def _enters(self, node: ir.Node, region: Region) -> bool:
        """True when ``node`` leads into the region from something that stays as it is."""
        source = node.inputs[0] if self._change.leads_in(node) else None
        return source is not None and source.producer() not in region

    def _turn(self, turned: Region) -> None:
        """Let the nodes of ``turned`` (in order) compute on the outer form."""
        outer: dict[ir.Value, ir.Value] = {}
        around = [p for node in turned for v in tensors(node) if (p := v.producer()) is not None]
        around += [use.node for node in turned for v in node.outputs for use in v.uses()]
        for node in turned:
            self._change.rewrite(node)
            moving = set(tensors(node))
            for k, value in enumerate(list(node.inputs)):
                if value in moving and value is not None:
                    node.replace_input_with(k, self._outer(value, node, turned, outer))
        for node in turned:
            for value in node.outputs:
                self._settle(value, node, turned)
        # A change that is left without readers must not be found again: what it reads may have been turned.
        for node in dict.fromkeys(around):
            dead = node.graph is self._change.top and not any(v.uses() or v.is_graph_output() for v in node.outputs)
            if dead and (self._change.leads_in(node) or self._change.leads_out(node)):
                self._change.top.remove(node, safe=True)

    def _outer(self, value: ir.Value, reader: ir.Node, turned: Region, known: dict[ir.Value, ir.Value]) -> ir.Value:
        """The outer form of what a turned node reads."""
        producer = value.producer()
        if producer in turned:
            return value
        if producer is not None and self._enters(producer, turned) and producer.inputs[0] is not None:
            return producer.inputs[0]
        if value not in known:
            new = self._change.leave(value, reader)
            new.type = value.type
            self._change.shapes.set(new, Fact(self._outer_shape(value)))
            known[value] = new
        return known[value]

    def _outer_shape(self, value: ir.Value) -> Shape:
        shape = self._change.shapes.shape(value)
        assert shape is not None
        return self._change.outer(shape)

    def _settle(self, value: ir.Value, node: ir.Node, turned: Region) -> None:
        """``value`` has the outer form now: give everybody else what they had."""
        shapes, declared, inner = self._change.shapes, value.shape, self._change.shapes.shape(value)
        outs: list[ir.Node] = []
        others: list[tuple[ir.Node, int]] = []
        for use in list(value.uses()):
            if use.node in turned and value in tensors(use.node):
                continue
            if self._change.leads_out(use.node):
                outs.append(use.node)
            else:
                others.append((use.node, use.idx))
        shapes.set(value, Fact(self._outer_shape(value)))
        value.shape = None if declared is None else self._change.declared(declared)
        if others or value.is_graph_output():
            new = self._change.enter(value, node)
            new.type, new.shape = value.type, declared
            shapes.set(new, Fact(inner))
            for user, index in others:
                user.replace_input_with(index, new)
            self._give_output(value, new)
        for out in outs:
            replace(out.outputs[0], value)

    def _give_output(self, value: ir.Value, new: ir.Value) -> None:
        """Make ``new`` the graph output that ``value`` was."""
        top = self._change.top
        for k, output in enumerate(top.outputs):
            if output is value:
                value.name, new.name = fresh_name(top, f"{value.name}_turned"), value.name
                top.outputs[k] = new
