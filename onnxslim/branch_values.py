"""Values inside the branches of If nodes, brought to the main graph, where they can be looked at.

A value of one branch becomes one more output of the If; the other branch gives an empty tensor in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim.graph import add_constant, add_node, fresh_name, is_op, subgraphs

Owner = tuple[ir.Node, ir.Graph]  # an If, and the branch of it


def visible(model: ir.Model) -> Iterator[tuple[ir.Value, tuple[Owner, ...]]]:
    """Values computed in branches of If nodes that can be lifted, each with the branches around it, outermost first.

    What is in the body of a Loop or Scan is computed many times and is not among them, nor is what has no known type.
    """
    names = {v.name for node in model.graph for v in node.outputs}
    for value, around in _visible(model.graph, ()):
        if value.name not in names:  # two branches may use a name for different values
            names.add(value.name)
            yield value, around


def _visible(graph: ir.Graph, around: tuple[Owner, ...]) -> Iterator[tuple[ir.Value, tuple[Owner, ...]]]:
    for node in graph:
        if around:
            for value in node.outputs:
                if value.name and value.dtype is not None and (value.type is None or type(value.type) is ir.TensorType):
                    yield value, around
        if is_op(node, "If"):
            for branch in subgraphs(node):
                yield from _visible(branch, (*around, (node, branch)))


def lift(model: ir.Model, names: Sequence[str]) -> dict[str, ir.Value]:
    """Give the values ``names`` of branches as values of the main graph, in place: {name: value}."""
    if not names:
        return {}
    wanted = set(names)
    result: dict[str, ir.Value] = {}
    for value, around in [found for found in visible(model) if found[0].name in wanted]:
        name, dtype = value.name or "", value.dtype
        assert dtype is not None
        for owner, branch in reversed(around):
            if value.is_graph_output():
                copy = add_node(branch, "Identity", [value], hint=fresh_name(model.graph, f"{name}_copy"), like=value)
                value = copy.outputs[0]
            for body in subgraphs(owner):
                body.outputs.append(value if body is branch else _empty(model, body, name, dtype))
            outer = ir.Value(name=fresh_name(model.graph, f"{name}_lifted"), type=ir.TensorType(dtype))
            value = _with_output(owner, outer)
        result[name] = value
    return result


def _empty(model: ir.Model, body: ir.Graph, name: str, dtype: ir.DataType) -> ir.Value:
    """A tensor (0,) at the end of a branch."""
    constant = add_constant(model.graph, f"{name}_none", np.empty(0, dtype.numpy()))
    node = add_node(body, "Identity", [constant], hint=fresh_name(model.graph, f"{name}_none"))
    node.outputs[0].type = ir.TensorType(dtype)
    return node.outputs[0]


def _with_output(node: ir.Node, value: ir.Value) -> ir.Value:
    """Add an output to ``node``."""
    node.resize_outputs(len(node.outputs) + 1)
    added = node.outputs[-1]
    added.name, added.type = value.name, value.type
    return added
