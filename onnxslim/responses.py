"""What becomes of a value in the elementwise operators that read it, as a function of one number.

Storing a tensor costs what its readers make of the error. Hard-swish maps everything below -3 to zero, so a range that
reaches further down wastes levels on values that do not matter. When every reader of a value is elementwise with
scalar constants, and all of them flow into one value, that value is a function of the first one alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from scipy import special

from onnxslim.graph import attribute, constant, is_constant, is_op, known_shape

Function = Callable[[np.ndarray], np.ndarray]

_UNARY: dict[str, Callable[[ir.Node, np.ndarray], np.ndarray]] = {
    "Relu": lambda n, x: np.maximum(x, 0),
    "LeakyRelu": lambda n, x: np.where(x < 0, attribute(n, "alpha", 0.01) * x, x),
    "Sigmoid": lambda n, x: special.expit(x),
    "Tanh": lambda n, x: np.tanh(x),
    "Erf": lambda n, x: special.erf(x),
    "Softplus": lambda n, x: np.logaddexp(0, x),
    "HardSigmoid": lambda n, x: np.clip(attribute(n, "alpha", 0.2) * x + attribute(n, "beta", 0.5), 0, 1),
    "HardSwish": lambda n, x: x * np.clip(x / 6 + 0.5, 0, 1),
    "Gelu": lambda n, x: x * special.ndtr(x),
}
_BINARY: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
}
ELEMENTWISE = (*_UNARY, *_BINARY, "Clip")


def response(value: ir.Value) -> tuple[Function, ir.Value] | None:
    """The function that takes ``value`` to the one value through which everything else sees it, and that value.

    None when there is no such function but the identity.
    """
    inside: dict[ir.Value, None] = {value: None}
    nodes: list[ir.Node] = []
    pending = _readers(value)
    while pending:
        node = pending.pop(0)
        if node in nodes or not _elementwise(node, inside):
            continue
        nodes.append(node)
        inside[node.outputs[0]] = None
        pending.extend(_readers(node.outputs[0]))
    while True:
        seen = [v for v in inside if v.is_graph_output() or any(u.node not in nodes for u in v.uses())]
        if value in seen or not nodes:
            return None
        if len(seen) == 1:
            break
        # Give up what lies behind the first way out that is not the last: the longest common part remains.
        node = nodes.pop()
        inside.pop(node.outputs[0])
    end = seen[0]

    def function(x: np.ndarray) -> np.ndarray:
        values: dict[ir.Value, np.ndarray] = {value: x}
        for node in nodes:
            values[node.outputs[0]] = _evaluate(node, values)
        return values[end]

    return function, end


def _readers(value: ir.Value) -> list[ir.Node]:
    return list(dict.fromkeys(use.node for use in value.uses()))


def _elementwise(node: ir.Node, inside: dict[ir.Value, None]) -> bool:
    """Whether ``node`` is a function of the values ``inside`` and scalars."""
    if is_op(node, *_UNARY):
        return node.inputs[0] in inside and attribute(node, "approximate", "none") == "none"
    if is_op(node, "Clip"):
        return node.inputs[0] in inside and all(v is None or is_constant(v) for v in node.inputs[1:])
    if not is_op(node, *_BINARY):
        return False
    return all(v in inside or _is_scalar(v) for v in node.inputs if v is not None)


def _is_scalar(value: ir.Value) -> bool:
    return is_constant(value) and all(size == 1 for size in known_shape(value) or ())


def _evaluate(node: ir.Node, values: dict[ir.Value, np.ndarray]) -> np.ndarray:
    operands: list[np.ndarray | None] = []
    for value in node.inputs:
        if value is None:
            operands.append(None)
        elif value in values:
            operands.append(values[value])
        else:
            array = constant(value)
            assert array is not None
            operands.append(array.reshape(()).astype(np.float64))
    return evaluate(node, operands)


def evaluate(node: ir.Node, operands: list[np.ndarray | None]) -> np.ndarray:
    """What an operator of `ELEMENTWISE` makes of its operands, numbers or arrays of one shape, in float64."""
    first = operands[0]
    assert first is not None
    if node.op_type == "Clip":
        low, high = (*operands[1:3], None, None)[:2]
        low, high = attribute(node, "min", low), attribute(node, "max", high)  # as before opset 11
        return np.clip(first, -np.inf if low is None else low, np.inf if high is None else high)
    if node.op_type in _UNARY:
        return _UNARY[node.op_type](node, first)
    second = operands[1]
    assert second is not None
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(_BINARY[node.op_type](first, second))
