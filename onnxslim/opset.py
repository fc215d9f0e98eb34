"""Raises a model to a newer version of the standard operator set, in place, without touching anything else.

`onnx.version_converter` works on a serialized copy: it drops metadata, needs the weights in memory, and refuses Q/DQ
models. Between opsets 7 and 21 few operators changed in more than the types they accept; each change is a rule here:

* attributes that became inputs: all other reductions (18); Squeeze, Unsqueeze, ReduceSum, Split (13); Clip, Pad (11);
  TopK, Slice (10);
* DFT takes its axis as an input (20);
* Split into equal parts states their number (18); GridSample renamed its modes (20); RoiAlign has another default (16);
* Softmax, LogSoftmax, Hardmax: to 12 they flatten the tensor at ``axis`` (default 1) and normalize over the rest, from
  13 over ``axis`` alone (default -1);
* Upsample, and Resize of opset 10, become Resize with asymmetric coordinates; Scatter becomes ScatterElements;
* Dropout is the identity at inference; BatchNormalization loses ``spatial``.

Every other operator must have kept its inputs and attributes, which the schemas of the installed onnx decide; a model
with one that has not is left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim import graph as g

OLDEST, NEWEST = 7, 21


class _CannotError(Exception):
    """A node without an equivalent in the new operator set; the text says why."""


def raise_opset(model: ir.Model, version: int = 13) -> str | None:
    """Bring ``model`` to at least opset ``version`` (21 or older), in place.

    Returns:
        None when the model is at ``version`` or newer afterwards, else why it was left as it was.
    """
    old = g.opset(model)
    if old >= version:
        return None
    if old < OLDEST or version > NEWEST:
        return f"opset {old} cannot be raised to {version}: only {OLDEST} to {NEWEST} are known"
    draft = model.clone()
    try:
        for node in list(draft.graph.all_nodes()):
            if node.domain in ("", "ai.onnx"):
                _convert(draft, node, old, version)
    except _CannotError as reason:
        return f"opset {old} cannot be raised to {version}: {reason}"
    # Nothing can fail any more: the same steps on the model itself.
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx"):
            _convert(model, node, old, version)
    g.remove_dead(model.graph)
    model.graph.opset_imports[""] = version
    # The format of the file must know the operator set, or the checker of onnx refuses it.
    model.ir_version = max(
        model.ir_version or 0, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
    )
    for node in model.graph.all_nodes():
        node.version = None
    for sub in model.graph.subgraphs():
        if "" in sub.opset_imports:
            sub.opset_imports[""] = version
    return None


def _convert(model: ir.Model, node: ir.Node, old: int, new: int) -> None:
    since = _since(node, old)
    if since == _since(node, new, missing=-1):
        return
    rule = _RULES.get(node.op_type)
    if rule is not None:
        rule(model, node, since, new)
    else:
        _require_compatible(node, old, new)


def _since(node: ir.Node, version: int, missing: int | None = None) -> int:
    try:
        return int(onnx.defs.get_schema(node.op_type, version, "").since_version)
    except onnx.defs.SchemaError as error:
        if missing is not None:
            return missing
        raise _CannotError(f"{node.op_type} is not an operator of opset {version}") from error


def _require_compatible(node: ir.Node, old: int, new: int) -> None:
    """Raise unless the newer schema has every input and attribute of the older one in the same place."""
    try:
        before = onnx.defs.get_schema(node.op_type, old, "")
        after = onnx.defs.get_schema(node.op_type, new, "")
    except onnx.defs.SchemaError as error:
        raise _CannotError(f"{node.op_type} is not an operator of opset {new}") from error
    if after.deprecated:
        raise _CannotError(f"{node.op_type} is deprecated in opset {new}")
    names = [i.name for i in before.inputs]
    # Names of inputs are not part of the contract; their number and order are.
    if len(after.inputs) < len(names):
        raise _CannotError(f"{node.op_type} has other inputs in opset {new}")
    for name in node.attributes:
        if name not in after.attributes:
            raise _CannotError(f"{node.op_type} has no attribute {name!r} in opset {new}")
    for name in before.attributes.keys() & after.attributes.keys() - node.attributes.keys():
        old_default, new_default = before.attributes[name].default_value, after.attributes[name].default_value
        if old_default.SerializeToString() != new_default.SerializeToString():
            raise _CannotError(f"{node.op_type} has another default {name!r} in opset {new}")


def _to_input(model: ir.Model, node: ir.Node, name: str, index: int, dtype: type | None = np.int64) -> None:
    """Move the attribute ``name`` to the input ``index``."""
    value = g.attribute(node, name)
    if value is None:
        return
    node.attributes.pop(name)
    element = dtype if dtype is not None else _dtype(node.inputs[0])
    _set_input(model, node, index, np.asarray(value, element), name)


def _set_input(model: ir.Model, node: ir.Node, index: int, array: np.ndarray, name: str) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, g.add_constant(model.graph, f"{node.outputs[0].name}_{name}", array))


def _dtype(value: ir.Value | None) -> np.dtype:
    if value is None or value.dtype is None:
        raise _CannotError("the type of a tensor is unknown")
    return value.dtype.numpy()


def _axes(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if new >= 13:
        _to_input(model, node, "axes", 1)


def _reduce(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if new >= 18:
        _to_input(model, node, "axes", 1)


def _split(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if new >= 13:
        _to_input(model, node, "split", 1)
    if since < 18 <= new and (len(node.inputs) < 2 or node.inputs[1] is None):
        g.set_attribute(node, "num_outputs", len(node.outputs))


def _grid_sample(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since < 20 <= new:
        mode = g.attribute(node, "mode", "bilinear")
        g.set_attribute(node, "mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


def _dft(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since < 20 <= new:
        axis = g.attribute(node, "axis", 1)
        node.attributes.pop("axis", None)
        _set_input(model, node, 2, np.array(axis, np.int64), "axis")


def _roi_align(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since < 16 <= new:
        g.set_attribute(node, "coordinate_transformation_mode", "output_half_pixel")


def _clip(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since < 11 <= new:
        # The bounds were float attributes with the largest floats as defaults: absent inputs mean the same.
        _to_input(model, node, "min", 1, None)
        _to_input(model, node, "max", 2, None)


def _pad(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since < 11 <= new:
        _to_input(model, node, "pads", 1)
        _to_input(model, node, "value", 2, None)


def _topk(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since < 10 <= new:
        k = g.attribute(node, "k")
        node.attributes.pop("k")
        _set_input(model, node, 1, np.array([k], np.int64), "k")


def _slice(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since < 10 <= new:
        _to_input(model, node, "starts", 1)
        _to_input(model, node, "ends", 2)
        _to_input(model, node, "axes", 3)


def _dropout(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since >= 12:
        return
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if mask is not None and (mask.uses() or mask.is_graph_output()):
        if since < 10:
            raise _CannotError("the mask of a Dropout is used and changed its type")
        node.attributes.pop("ratio", None)  # without effect at inference
        return
    source = node.inputs[0]
    assert source is not None
    if mask is not None:
        node.resize_outputs(1)
    for name in list(node.attributes):
        node.attributes.pop(name)
    node.op_type = "Identity"


def _batch_normalization(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if g.attribute(node, "spatial", 1) != 1:
        raise _CannotError("BatchNormalization with spatial=0")
    if len(node.outputs) > 1:
        raise _CannotError("BatchNormalization in training mode")
    node.attributes.pop("spatial", None)


def _softmax(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if new < 13:
        return
    source, axis = node.inputs[0], int(g.attribute(node, "axis", 1))
    shape = g.known_shape(source)
    if shape is None:
        raise _CannotError(f"{node.op_type} of a tensor of unknown rank")
    axis %= max(len(shape), 1)
    if all(size == 1 for size in shape[axis + 1 :]):
        g.set_attribute(node, "axis", axis)
        return
    # Reshape to (rows, rest), normalize the rest, reshape back to the shape at run time.
    assert source is not None and node.graph is not None
    flat = g.add_node(model.graph, "Flatten", [source], before=node, attributes={"axis": axis})
    size = g.add_node(model.graph, "Shape", [source], before=node)
    node.replace_input_with(0, flat.outputs[0])
    g.set_attribute(node, "axis", 1)
    output = node.outputs[0]
    back = g.add_node(model.graph, "Reshape", [output, size.outputs[0]], after=node, like=output)
    output.shape = None
    g.replace(output, back.outputs[0])
    back.replace_input_with(0, output)


def _resize(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if since >= 11 or new < 11:
        return
    if node.op_type == "Upsample" and since < 9:
        scales = np.asarray(g.attribute(node, "scales"), np.float32)
        node.attributes.pop("scales")
    else:
        found = g.constant(node.inputs[1])
        if found is None:
            raise _CannotError(f"{node.op_type} with scales computed at run time")
        scales = np.asarray(found, np.float32)
    mode = g.attribute(node, "mode", "nearest")
    if mode == "nearest" and (scales < 1).any() and (scales > 1).any():
        raise _CannotError(f"{node.op_type} that enlarges one axis and shrinks another")
    node.op_type = "Resize"
    g.set_attribute(node, "mode", mode)
    g.set_attribute(node, "coordinate_transformation_mode", "asymmetric")
    if mode == "nearest":
        # Opset 10 leaves the rounding open; runtimes truncate when enlarging and round up when shrinking.
        g.set_attribute(node, "nearest_mode", "ceil" if (scales < 1).any() else "floor")
    node.resize_inputs(3)
    node.replace_input_with(1, g.add_constant(model.graph, f"{node.outputs[0].name}_roi", np.zeros(0, np.float32)))
    node.replace_input_with(2, g.add_constant(model.graph, f"{node.outputs[0].name}_scales", scales))


def _scatter(model: ir.Model, node: ir.Node, since: int, new: int) -> None:
    if new >= 11:
        node.op_type = "ScatterElements"


_RULES: dict[str, Callable[[ir.Model, ir.Node, int, int], None]] = {
    "Squeeze": _axes,
    "Unsqueeze": _axes,
    "ReduceSum": _axes,
    **dict.fromkeys(
        (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSumSquare",
        ),
        _reduce,
    ),
    "GridSample": _grid_sample,
    "RoiAlign": _roi_align,
    "DFT": _dft,
    "Split": _split,
    "Clip": _clip,
    "Pad": _pad,
    "TopK": _topk,
    "Slice": _slice,
    "Dropout": _dropout,
    "BatchNormalization": _batch_normalization,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Hardmax": _softmax,
    "Resize": _resize,
    "Upsample": _resize,
    "Scatter": _scatter,
}
