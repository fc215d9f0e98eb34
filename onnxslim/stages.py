"""Large models run a part at a time, so that memory holds the weights of one part only.

The main graph is cut between nodes where little is alive: every part takes the values that the parts before it left. A
part is loaded, run and dropped at every pass, its weights read from where they lie in the file: slow, and meant for
models that must be run a few times, to be compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxslim.graph import is_constant, remove_dead, subgraphs


@dataclasses.dataclass(frozen=True)
class Stage:
    """Part of a model as a model; ``takes`` and ``gives`` are the names of its inputs and outputs."""

    model: ir.Model
    takes: tuple[str, ...]
    gives: tuple[str, ...]


def cut(model: ir.Model, limit: int) -> list[Stage]:
    """``model`` in parts of about ``limit`` bytes of weights; none where it cannot be cut.

    A value can be handed over where its type is known and is a tensor. Weights are shared with ``model``.
    """
    if any(value.producer() is None or not value.name for value in model.graph.outputs):
        return []
    nodes = list(model.graph)
    last = {value: k for k, node in enumerate(nodes) for value in reads(node)}
    finals = set(model.graph.outputs)
    bounds = [0]
    held: dict[ir.Value, int] = {}
    alive: set[ir.Value] = set()
    for k, node in enumerate(nodes):
        held.update((v, v.const_value.nbytes) for v in reads(node) if v.const_value is not None and is_constant(v))
        alive |= {v for v in node.outputs if last.get(v, k) > k}
        alive = {v for v in alive if last[v] > k}
        if sum(held.values()) >= limit and k + 1 < len(nodes) and all(map(can_pass, alive)):
            bounds.append(k + 1)
            held.clear()
    stages = []
    for start, end in zip(bounds, [*bounds[1:], len(nodes)], strict=True):
        inside = {v for node in nodes[start:end] for v in node.outputs}
        read = dict.fromkeys(v for node in nodes[start:end] for v in reads(node))
        takes = [v for v in read if v not in inside and not is_constant(v)]
        gives = [v for v in inside if v in finals or last.get(v, -1) >= end]
        stages.append(part(model, [v.name or "" for v in takes], sorted(v.name or "" for v in gives)))
    return stages


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node of the main graph reads, its subgraphs included (values of these too)."""
    yield from (v for v in node.inputs if v is not None)
    for graph in subgraphs(node):
        for inner in graph.all_nodes():
            yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)
        yield from (v for v in graph.outputs if v.graph is node.graph)


def can_pass(value: ir.Value) -> bool:
    """True where a value can be an input or output of a part: a tensor of known type."""
    return isinstance(value.type, ir.TensorType) and bool(value.name)


def part(model: ir.Model, takes: Sequence[str], gives: Sequence[str]) -> Stage:
    """The part of a copy of ``model`` that makes ``gives`` out of ``takes``, values of the main graph."""
    clone = model.clone()
    graph = clone.graph
    own = {v.name for v in graph.inputs}
    values = {v.name: v for node in graph for v in node.outputs}
    graph.outputs.clear()
    for name in gives:
        values[name].shape = None
        graph.outputs.append(values[name])
    for name in takes:
        if name in own:
            continue
        old = values[name]
        new = ir.Value(name=name, type=old.type)
        old.name = f"{name}_before"
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.inputs.append(new)
    for value in list(graph.inputs):
        if value.name not in takes:
            graph.inputs.remove(value)
    remove_dead(graph)
    return Stage(clone, tuple(takes), tuple(gives))
