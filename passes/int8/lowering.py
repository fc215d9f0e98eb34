"""Operators written otherwise, so that ONNX Runtime's integer kernels compute them, or compute them right."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxslim.graph import (
    add_constant,
    add_node,
    attribute,
    constant,
    in_branches,
    is_constant,
    is_op,
    known_shape,
    only_user,
    opset,
    remove_dead,
    replace,
)
from onnxslim.linear import batchnorm_statistics, float64, inference_batchnorm
from onnxslim.opset import raise_opset
from onnxslim.units import MOVES, saturating


def protect_pools(model: ir.Model) -> None:
    """Keep AveragePool nodes from the integer kernel that it does not compute, in place.

    ONNX Runtime's kernel has no dilations, and where a pool counts its padding and rounds its size up, it also counts
    what the last window has beyond the padding, which the operator does not.
    """
    for node in list(in_branches(model.graph)):
        if not is_op(node, "AveragePool"):
            continue
        beyond = attribute(node, "count_include_pad", 0) and attribute(node, "ceil_mode", 0)
        if beyond and attribute(node, "auto_pad", "NOTSET") == "NOTSET" and not any(attribute(node, "pads", [])):
            node.attributes.pop("count_include_pad")  # without padding there is none to count
            beyond = 0
        source = node.inputs[0]
        assert source is not None
        if beyond or any(d != 1 for d in attribute(node, "dilations", [])):
            node.replace_input_with(0, _barrier(model, source, before=node))  # between it and the pool there is no pair


def protect_captured(model: ir.Model) -> None:
    """Keep ONNX Runtime from moving a DequantizeLinear to where only a subgraph reads, in place.

    It moves them behind operators that move values, and looks for all readers among the inputs of nodes: it ends the
    process (1.32) where a reader is in the body of an If, Loop or Scan.
    """
    for node in list(in_branches(model.graph)):
        for value in node.outputs if is_op(node, *MOVES) else ():
            inside = [use for use in value.uses() if use.node.graph is not node.graph]
            if inside and value.dtype == ir.DataType.FLOAT:
                barrier = _barrier(model, value, after=node)
                for use in inside:
                    use.node.replace_input_with(use.idx, barrier)


def spell_out_axes(model: ir.Model) -> None:
    """Make every Resize and Pad of some axes one of all axes, in place.

    ONNX Runtime (1.32) takes what is told of some axes for that of all when it moves a Transpose across, as it does
    around integer convolutions. A Resize that is not the same then, or has no kernel with channels last (a cubic one
    that shrinks), is kept in place by an operator that no Transpose is moved across, for which the operator set is
    raised to 14 where it is older.
    """
    for node in list(in_branches(model.graph)):
        source = node.inputs[0] if node.inputs else None
        rank = len(known_shape(source) or ())
        if source is None or source.dtype is not ir.DataType.FLOAT or not rank:
            continue
        if is_op(node, "Pad") and len(node.inputs) > 3 and node.inputs[3] is not None:
            axes = constant(node.inputs[3])
            if axes is not None:
                order = [int(a) % rank for a in axes]
                whole = add_constant(model.graph, f"{node.name}_none", np.zeros(2 * rank, np.int64))
                _spell_out(model, node, 1, [*order, *(a + rank for a in order)], whole)
                node.resize_inputs(3)
        elif is_op(node, "Resize"):
            own = [attribute(node, "keep_aspect_ratio_policy", "stretch") != "stretch"]
            own.append(attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize")
            if "axes" in node.attributes and not any(own):
                index = max(k for k, value in enumerate(node.inputs) if value is not None)
                if index == 2:
                    whole = add_constant(model.graph, f"{node.name}_ones", np.ones(rank, np.float32))
                else:
                    whole = add_node(model.graph, "Shape", [source], before=node).outputs[0]
                    whole.type = ir.TensorType(ir.DataType.INT64)
                _spell_out(model, node, index, [a % rank for a in attribute(node, "axes", [])], whole)
                node.attributes.pop("axes")
            scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
            grows = scales is not None and scales.size and scales.min() >= 1
            if "axes" in node.attributes or (attribute(node, "mode", "nearest") == "cubic" and not grows):
                if opset(model) < 14:
                    raise_opset(model, 14)
                every = add_constant(model.graph, f"{node.name}_below", np.array(-(2**31), np.int64))
                kept = add_node(
                    model.graph, "Trilu", [source, every], before=node, attributes={"upper": 1}, like=source
                )
                node.replace_input_with(0, kept.outputs[0])


def _spell_out(model: ir.Model, node: ir.Node, index: int, order: list[int], whole: ir.Value) -> None:
    """Give ``node`` as its input ``index`` the values ``whole`` with its present input at the places ``order``."""
    told, base = constant(node.inputs[index]), constant(whole)
    if told is not None and base is not None:
        array = base.copy()
        array[order] = told
        full = add_constant(model.graph, f"{node.name}_all_axes", array)
    else:
        places = add_constant(model.graph, f"{node.name}_axes", np.array(order, np.int64))
        inputs = [whole, places, node.inputs[index]]
        full = add_node(model.graph, "ScatterElements", inputs, before=node, like=whole).outputs[0]
    node.replace_input_with(index, full)


def _barrier(
    model: ir.Model, value: ir.Value, *, before: ir.Node | None = None, after: ir.Node | None = None
) -> ir.Value:
    """``value`` once more, behind an operator that nothing is moved across: the maximum of it and itself."""
    return add_node(model.graph, "Max", [value, value], like=value, before=before, after=after).outputs[0]


def clip_bounded(model: ir.Model) -> None:
    """Make a Clip of every Max and Min of a value and a number, one Clip of those in a row, in place; float32.

    What is stored saturates at the bounds of a Clip by itself.
    """
    made: dict[ir.Node | None, tuple[ir.Value, float, float]] = {}
    for node in list(in_branches(model.graph)):
        found = _bounded(node)
        if found is None:
            continue
        value, low, high = found
        if value.producer() in made and only_user(value) is node:
            inner, lowest, highest = made[value.producer()]
            if max(low, lowest) <= min(high, highest):
                value, low, high = inner, max(low, lowest), min(high, highest)
        bounds = [
            None if np.isinf(a) else add_constant(model.graph, f"{node.name}_bound", np.array(a, np.float32))
            for a in (low, high)
        ]
        clip = add_node(model.graph, "Clip", [value, *bounds], before=node, like=node.outputs[0])
        made[clip] = value, low, high
        replace(node.outputs[0], clip.outputs[0])
        remove_dead(model.graph, start=[node])


def _bounded(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """The value that a Max or Min keeps from going below the second, or above the third of what is returned."""
    if not is_op(node, "Max", "Min") or len(node.inputs) != 2 or node.outputs[0].dtype is not ir.DataType.FLOAT:
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        number, shape = constant(other), known_shape(value)
        if value is None or is_constant(value) or number is None or number.size != 1 or shape is None:
            continue
        if number.ndim <= len(shape):  # else the result has more axes
            bound = float(number.item())
            return (value, bound, np.inf) if node.op_type == "Max" else (value, -np.inf, bound)
    return None


def convolve_normalizations(model: ir.Model) -> None:
    """Make depthwise convolutions of one tap of the BatchNormalizations in front of convolutions, in place.

    ``y = s x + t`` per channel has an integer kernel as a Conv only; in float ONNX Runtime's CPU provider runs both
    alike. Data of four axes, float32.
    """
    for node in list(in_branches(model.graph)):
        source = node.inputs[0] if node.inputs else None
        if not inference_batchnorm(node) or source is None or len(known_shape(source) or ()) != 4:
            continue
        end = saturating(node.outputs[0]) or node
        users = end.outputs[0].uses()
        if source.dtype is not ir.DataType.FLOAT or not users or not all(is_op(use.node, "Conv") for use in users):
            continue
        mean, gain = batchnorm_statistics(node, float64)
        scale, offset = (float64(v) for v in node.inputs[1:3] if v is not None)
        weight, bias = (a.astype(np.float32) for a in (scale * gain, offset - scale * gain * mean))
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            continue
        constants = [
            add_constant(model.graph, f"{node.name}_scale", weight.reshape(-1, 1, 1, 1)),
            add_constant(model.graph, f"{node.name}_offset", bias),
        ]
        attributes = {"group": len(bias)}
        inputs = [source, *constants]
        conv = add_node(model.graph, "Conv", inputs, before=node, attributes=attributes, like=node.outputs[0])
        conv.name, node.name = node.name, None
        replace(node.outputs[0], conv.outputs[0])
        remove_dead(model.graph, start=[node])
