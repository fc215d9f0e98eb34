"""Functions become nodes, and constants become initializers of the main graph, wherever they stand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
)

from onnxslim.errors import ModelError
from onnxslim.graph import fresh_name, is_op


def inline_functions(model: ir.Model) -> None:
    """Replace every call of a model-local function by the nodes of the function, in place.

    Raises:
        ModelError: a function calls itself, takes a graph for an attribute, or means another version of an operator.
    """
    for function in model.functions.values():
        _agree(function, model)
    try:
        InlinePass()(model)
    except (ValueError, ir.passes.PreconditionError) as error:
        raise ModelError(f"the functions of the model cannot be inlined: {error}; export it without them") from error


def lift_constants(model: ir.Model) -> None:
    """Move the constants of the graph and of all bodies in it to the initializers of the main graph, in place."""
    _part_names(model.graph)
    for node in model.graph.all_nodes():
        if is_op(node, "Constant"):
            _encode_text(node)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    LiftSubgraphInitializersToMainGraphPass()(model)


def _agree(function: ir.Function, model: ir.Model) -> None:
    """Let ``function`` import what the model does where that is the same version of every operator it uses."""
    for domain, version in function.opset_imports.items():
        wanted = model.opset_imports.get(domain, version)
        used = {node.op_type for node in _nodes(function) if node.domain == domain}
        if version != wanted and all(_since(name, version, domain) == _since(name, wanted, domain) for name in used):
            function.opset_imports[domain] = wanted


def _nodes(body: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """The nodes of a body and of those in it; a graph that is a parameter of the function has none yet."""
    for node in body:
        yield node
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH and not attribute.is_ref():
                yield from _nodes(attribute.as_graph())


def _since(name: str, version: int, domain: str) -> int:
    """The version of its domain with which an operator came to be what it is; ``version`` where nobody knows."""
    try:
        return int(onnx.defs.get_schema(name, version, domain).since_version)
    except onnx.defs.SchemaError:
        return version


def _part_names(graph: ir.Graph) -> None:
    """Give each value of a body that has another value's name a fresh one.

    Two branches may use the same names; the graph that the constants of both move to may not.
    """
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    taken.update(value.name for node in graph for value in node.outputs)
    for body in graph.subgraphs():
        values = dict.fromkeys([*body.inputs, *body.initializers.values(), *(v for node in body for v in node.outputs)])
        for value in values:
            if value.name and value.name in taken:
                value.name = fresh_name(graph, value.name)
            taken.add(value.name)


def _encode_text(node: ir.Node) -> None:
    """Write the strings of a Constant as a tensor, which holds any text."""
    for name in ("value_string", "value_strings"):
        if (found := node.attributes.get(name)) is not None:
            texts = [found.as_string()] if name == "value_string" else found.as_strings()
            shape = ir.Shape([] if name == "value_string" else [len(texts)])
            tensor = ir.StringTensor([text.encode() for text in texts], shape=shape)
            del node.attributes[name]
            node.attributes["value"] = ir.AttrTensor("value", tensor)
