"""Optional inputs that say what holds without them: the zeros with which a recurrent layer starts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxslim.graph import attribute, constant

# Per operator, the inputs that are assumed to be 0 where they are left out. Exporters compute these states from the
# size of the batch, in several nodes.
_ZERO = {"GRU": (5,), "LSTM": (5, 6), "RNN": (5,)}
# Operators whose result holds elements of their first input and nothing else.
_MOVES = frozenset(
    {"Cast", "CastLike", "Expand", "Flatten", "Gather", "Identity", "Reshape"}
    | {"Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)


def drop_zeros(node: ir.Node) -> int:
    """Leave out the inputs of ``node`` that are what is assumed without them; returns their number."""
    if node.domain not in ("", "ai.onnx"):
        return 0
    dropped = [k for k in _ZERO.get(node.op_type, ()) if k < len(node.inputs) and is_zero(node.inputs[k])]
    for k in dropped:
        node.replace_input_with(k, None)
    count = len(node.inputs)
    while dropped and count and node.inputs[count - 1] is None:
        count -= 1
    if dropped:
        node.resize_inputs(count)
    return len(dropped)


def is_zero(value: ir.Value | None) -> bool:
    """True when every element of a tensor is 0, however many there are when the model runs."""
    waiting = [value]
    while waiting:
        here = waiting.pop()
        array = constant(here)
        node = None if here is None else here.producer()
        if array is not None:
            if array.dtype.kind not in "biuf" or np.any(array):
                return False
        elif node is None or node.domain not in ("", "ai.onnx"):
            return False
        elif node.op_type == "ConstantOfShape":
            fill = attribute(node, "value")
            if fill is not None and np.any(fill.numpy()):
                return False
        elif node.op_type in _MOVES:
            waiting.append(node.inputs[0])
        elif node.op_type == "Concat":
            waiting.extend(node.inputs)
        else:
            return False
    return True
