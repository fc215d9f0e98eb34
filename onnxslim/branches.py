"""An If whose condition is a constant becomes the branch it takes."""

from __future__ import annotations

import onnx_ir as ir

from onnxslim.graph import add_node, constant, fresh_name, is_op, remove_dead, replace


def inline_constant_if(node: ir.Node, top: ir.Graph) -> bool:
    """Move the nodes of the branch that ``node`` always takes before it and let them give its outputs.

    ``node`` itself stays, without users. The moved values get fresh names: branches may use the same ones.
    """
    condition = constant(node.inputs[0]) if is_op(node, "If") else None
    if condition is None or node.graph is None or not any(v.uses() or v.is_graph_output() for v in node.outputs):
        return False
    graph = node.graph
    chosen = node.attributes["then_branch" if condition.reshape(-1)[0] else "else_branch"].as_graph()
    results = list(chosen.outputs)
    remove_dead(chosen)
    # Every output of a graph of its own: a value of the outer graph, or one that is listed twice, takes an Identity,
    # as it did in the branch.
    chosen.outputs.clear()
    for inner in list(chosen):
        chosen.remove(inner)
        for value in inner.outputs:
            if value.name:
                value.name = fresh_name(top, value.name)
        inner.name = fresh_name(top, inner.name or inner.op_type)
        graph.insert_before(node, inner)
    for old, new in zip(node.outputs, results, strict=True):
        if old.is_graph_output() and (new.graph is not graph or new.is_graph_output() or new.producer() is None):
            new = add_node(top, "Identity", [new], before=node, like=old).outputs[0]
        if new.type is None:
            new.type = old.type
        replace(old, new)
    return True
