"""Inserts Q/DQ pairs so that the chosen operators run as integer kernels.

An execution provider that takes Q/DQ models recognizes a group DequantizeLinear → operator → QuantizeLinear and runs
it as one integer kernel. A group that is not complete runs in float *with* the conversions, slower than before, so
everything here follows the rules that ONNX Runtime's selectors check (other providers need less, see
`onnxslim.profiles`):

* every activation that an integer operator reads, and the one it writes, is stored in 8 bits with one scale;
* the value it writes has one reader, the QuantizeLinear; everybody else reads the DequantizeLinear behind it;
* weights are s8 and symmetric, one scale per output channel (Conv axis 0, Gemm 1 or, transposed, 0, MatMul 1);
* the bias of Conv and Gemm is int32 with scale ``scale_x * scale_w``;
* a Relu or Clip between operator and QuantizeLinear is dropped where storing saturates at the same bounds;
* operators that only move or select values share one scale between input and output.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim import runtime
from onnxslim.errors import ModelError
from onnxslim.profiles import CPU, Profile
from onnxslim.quantization import QParams, bias_params, quantize
from onnxslim.responses import ELEMENTWISE
from onnxslim.units import LOWERED, MOVES, PRODUCTS, Kind, Unit, connect, find_units, sources, stored_values
from onnxslim.upsample import by_copying, repeats


@dataclasses.dataclass(frozen=True)
class Plan:
    """What runs on integers, and how.

    Attributes:
        chosen: names of the units.
        params: storage parameters of activations, by the name of the value that owns the scale (see `sources`).
        weights: stored weight and its parameters, by unit.
        shift: what is added to the bias of a unit, (channels,): the mean error that quantization would cause.
        profile: the execution provider that is served.
        guessed: values whose rank may be another with other inputs.
    """

    chosen: frozenset[str]
    params: Mapping[str, QParams]
    weights: Mapping[str, tuple[np.ndarray, QParams]]
    shift: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    profile: Profile = CPU
    guessed: Collection[str] = ()


def insert(model: ir.Model, plan: Plan) -> None:
    """Rewrite ``model`` in place so that the units of ``plan`` run on integers; opset 13 or newer."""
    units = plan.profile.units(find_units(model)[0])
    writer = _Writer(model, units, plan)
    for name in stored_values(units, plan.chosen):
        writer.store(name)
    for name, unit in units.items():
        if name in plan.chosen:
            writer.constants(unit)
            if unit.op in LOWERED:
                writer.lower(unit)
            if unit.op == "Resize" and plan.profile.ep == "cpu":
                writer.repeat(unit)
    for name, unit in units.items():
        if name in plan.chosen and unit.kind is Kind.PRODUCT:
            writer.product(unit)
    if plan.profile.ep == "cpu":
        _shield(model)
    g.remove_dead(model.graph)


@functools.cache
def missing_kernel(opset: int) -> str | None:
    """Why the installed ONNX Runtime, behind onnx as it is, runs no pair of this operator set; None if it does."""
    data = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    graph = ir.Graph([data], [], nodes=[], opset_imports={"": opset}, name="probe")
    params = [
        g.add_constant(graph, name, array)
        for name, array in (("scale", np.array(1, np.float32)), ("zero", np.array(0, np.uint8)))
    ]
    pair = ir.node("QuantizeLinear", [data, *params])
    back = ir.node("DequantizeLinear", [pair.outputs[0], *params])
    back.outputs[0].name, back.outputs[0].type, back.outputs[0].shape = "y", data.type, data.shape
    graph.extend([pair, back])
    graph.outputs.append(back.outputs[0])
    try:
        runtime.load(ir.Model(graph, ir_version=10), threads=1)
    except ModelError:
        return f"the installed ONNX Runtime has no QuantizeLinear of operator set {opset}"
    return None


def stored_operand(unit: Unit, index: int, profile: Profile) -> tuple[np.ndarray, QParams]:
    """The constant input ``index`` of a glue unit as it is stored: with a range of its own."""
    array = g.constant(unit.node.inputs[index])
    assert array is not None
    params = profile.params(float(array.min()), float(array.max()))
    return quantize(array, params), params


def stores(producer: ir.Node | None, profile: Profile) -> bool:
    """Whether the kernel that ``producer`` is part of stores its result for all readers, though no unit writes it.

    Where pairs stand in front of products only, the kernel of a product takes in what is elementwise behind it, the sum
    with a residual for one, and the QuantizeLinear behind that if nobody reads the result unstored.
    """
    return not profile.around and g.is_op(producer, *PRODUCTS, *ELEMENTWISE)


def _shield(model: ir.Model) -> None:
    """Keep ONNX Runtime from storing the weights of products that were left in float.

    It does so, with one scale for the whole weight, for every Conv, ConvTranspose and Gemm between a DequantizeLinear
    with a scalar scale and a QuantizeLinear. A pair of the same numbers as vectors along the channels is not taken.
    """
    graph = model.graph
    for node in list(graph.all_nodes()):
        source, weight = (*node.inputs[:2], None, None)[:2]
        if not g.is_op(node, "Conv", "ConvTranspose", "Gemm") or source is None or weight is None:
            continue
        dq = source.producer()
        shape = g.known_shape(weight)
        if dq is None or not g.is_op(dq, "DequantizeLinear") or not g.is_constant(weight) or not shape:
            continue
        if node.op_type == "Conv":
            channels = int(shape[1] or 0) * int(g.attribute(node, "group", 1))
        elif node.op_type == "ConvTranspose":
            channels = int(shape[0] or 0)
        else:
            channels = int(shape[1 if g.attribute(node, "transB", 0) else 0] or 0)
        numbers = [g.constant(v) for v in dq.inputs[1:3]]
        if any(a is None or a.ndim for a in numbers) or g.attribute(node, "transA", 0):
            continue
        vectors = [
            g.add_constant(graph, f"{source.name}_{kind}", np.full(channels, a, a.dtype))
            for kind, a in zip(("scales", "zero_points"), numbers, strict=True)
            if a is not None
        ]
        inputs = [dq.inputs[0], *vectors]
        own = g.add_node(
            graph, "DequantizeLinear", inputs, before=node, attributes={"axis": 1}, hint=source.name or "", like=source
        )
        node.replace_input_with(0, own.outputs[0])


class _Writer:
    """Inserts pairs into one model; keeps the constants that pairs share."""

    def __init__(self, model: ir.Model, units: Mapping[str, Unit], plan: Plan) -> None:
        self.graph = model.graph
        self.units = units
        self.plan = plan
        self.owner = sources(units.values())
        self.writer, self.readers = connect(units)
        self.values = {v.name or "": v for v in model.graph.inputs}
        self.values.update((v.name or "", v) for node in g.in_branches(model.graph) for v in node.outputs)
        self.once = {node.graph for node in g.in_branches(model.graph)}
        self.shared: dict[str, tuple[ir.Value, ir.Value]] = {}

    def params(self, value: str) -> QParams:
        return self.plan.params[self.owner.get(value, value)]

    def store(self, name: str) -> None:
        """Put a pair behind the value ``name`` and let the right readers read it."""
        value = self.values[name]
        unit = self.units.get(self.writer.get(name, ""))
        written = unit is not None and unit.name in self.plan.chosen
        raw = value
        if written and unit is not None and unit.tail is not None:
            # What is stored saturates at the bounds of the Relu or Clip: the operator feeds the pair directly.
            raw = unit.tail.inputs[0] or value
        producer = raw.producer()
        home = self.graph if producer is None else producer.graph
        assert isinstance(home, ir.Graph)
        merged = stores(producer, self.plan.profile)
        # An integer operator reads a DequantizeLinear of its own graph.
        readers: dict[ir.Graph, list[tuple[ir.Node, int]]] = {}
        for node, index in value.uses():
            # In the body of a Loop it would be read back in every iteration.
            if self._takes_stored(node, name) or (merged and node.graph in self.once):
                assert isinstance(node.graph, ir.Graph)
                readers.setdefault(node.graph, []).append((node, index))
        q: ir.Node | None = None
        if written or home in readers:
            q = self._quantize(name, raw, value, home)
            dq = self._dequantize(name, q, value, home)
            if written:
                # The pair must be the only reader, or the operator cannot become one integer kernel.
                g.replace(value, dq.outputs[0])
                q.replace_input_with(0, raw)
            for node, index in readers.pop(home, ()):
                node.replace_input_with(index, dq.outputs[0])
        for branch, uses in readers.items():
            # A branch that stores the value for itself does so only when it is taken.
            dq = self._dequantize(name, q or self._quantize(name, raw, value, branch), value, branch)
            for node, index in uses:
                node.replace_input_with(index, dq.outputs[0])

    def _quantize(self, name: str, raw: ir.Value, value: ir.Value, graph: ir.Graph) -> ir.Node:
        """Store ``raw``, right behind what computes it or at the start of another ``graph``."""
        producer = raw.producer()
        after = producer if producer is not None and producer.graph is graph else None
        inputs = [raw, *self._constants_of(name)]
        first = graph[0] if after is None else None
        q = g.add_node(self.graph, "QuantizeLinear", inputs, hint=name, before=first, after=after)
        q.outputs[0].dtype, q.outputs[0].shape = self.plan.profile.dtype, value.shape
        return q

    def _dequantize(self, name: str, q: ir.Node, value: ir.Value, graph: ir.Graph) -> ir.Node:
        """Read back what ``q`` stores, right behind it or at the start of another ``graph``."""
        inputs = [q.outputs[0], *self._constants_of(name)]
        first, after = (None, q) if q.graph is graph else (graph[0], None)
        return g.add_node(self.graph, "DequantizeLinear", inputs, before=first, after=after, hint=name, like=value)

    def _takes_stored(self, node: ir.Node, name: str) -> bool:
        return any(r in self.plan.chosen and self.units[r].node is node for r in self.readers.get(name, ()))

    def _constants_of(self, name: str) -> tuple[ir.Value, ir.Value]:
        owner = self.owner.get(name, name)
        if owner not in self.shared:
            params = self.plan.params[owner]
            self.shared[owner] = (
                g.add_constant(self.graph, f"{owner}_scale", params.scale),
                g.add_constant(self.graph, f"{owner}_zero_point", params.zero_point),
            )
        return self.shared[owner]

    def constants(self, unit: Unit) -> None:
        """Store the constant operands of a glue unit as u8 with a range of their own."""
        for index in unit.constants:
            name = unit.node.inputs[index].name  # type: ignore[union-attr]
            value = self._dequantized(unit, f"{name}", *stored_operand(unit, index, self.plan.profile))
            unit.node.replace_input_with(index, value)

    def lower(self, unit: Unit) -> None:
        """Make HardSigmoid and HardSwish of integer operators.

        HardSigmoid(x) = clip(alpha x + beta, 0, 1): reading the stored x with the scale alpha * scale gives alpha x,
        an Add of the constant beta follows, and storing the sum in [0, 1] clips it. HardSwish multiplies that by x.
        """
        node = unit.node
        source = node.inputs[0]
        assert source is not None
        dq = source.producer()
        scale = g.constant(dq.inputs[1]) if dq is not None else None
        assert dq is not None and scale is not None
        swish = node.op_type == "HardSwish"
        alpha = 1 / 6 if swish else float(g.attribute(node, "alpha", 0.2))
        beta = 0.5 if swish else float(g.attribute(node, "beta", 0.5))
        name = node.outputs[0].name or unit.name
        scaled = g.add_constant(self.graph, f"{name}_scale", np.asarray(scale * alpha, np.float32))
        inputs = [dq.inputs[0], scaled, dq.inputs[2]]
        slope = g.add_node(self.graph, "DequantizeLinear", inputs, before=node, hint=name, like=source)
        params = self.plan.profile.params(min(beta, 0.0), max(beta, 0.0))
        offset = self._dequantized(unit, f"{name}_beta", quantize(np.array(beta), params), params)
        end = g.add_node(self.graph, "Add", [slope.outputs[0], offset], before=node, hint=name, like=node.outputs[0])
        if swish:
            gate = self.plan.profile.params(0.0, 1.0)
            constants = [
                g.add_constant(self.graph, f"{name}_gate_scale", gate.scale),
                g.add_constant(self.graph, f"{name}_gate_zero_point", gate.zero_point),
            ]
            q = g.add_node(self.graph, "QuantizeLinear", [end.outputs[0], *constants], before=node, hint=name)
            q.outputs[0].dtype = self.plan.profile.dtype
            inputs = [q.outputs[0], *constants]
            back = g.add_node(self.graph, "DequantizeLinear", inputs, before=node, hint=name, like=source)
            inputs = [source, back.outputs[0]]
            end = g.add_node(self.graph, "Mul", inputs, before=node, hint=name, like=node.outputs[0])
        end.name = unit.name
        g.replace(node.outputs[0], end.outputs[0])

    def repeat(self, unit: Unit) -> None:
        """Make a Resize that repeats pixels of copies, between what is stored in front of it and behind it."""
        node, times = unit.node, repeats(unit.node)
        if times is None or node.inputs[0] is None:
            return
        dq, q = node.inputs[0].producer(), g.only_user(node.outputs[0])
        assert dq is not None and q is not None and dq.inputs[0] is not None
        stored = by_copying(self.graph, dq.inputs[0], times, before=q, hint=unit.name)
        stored.shape = q.outputs[0].shape
        g.replace(q.outputs[0], stored)
        g.remove_dead(self.graph, start=[q])

    def product(self, unit: Unit) -> None:
        """Store weight and bias of a product."""
        assert unit.weight is not None
        index, axis = unit.weight
        weight = unit.node.inputs[index]
        assert weight is not None
        stored, params = self.plan.weights[unit.name]
        unit.node.replace_input_with(index, self._dequantized(unit, f"{weight.name}", stored, params))
        self._bias(unit, params, stored.shape[axis] if axis is not None else -1)

    def _bias(self, unit: Unit, weight: QParams, channels: int) -> None:
        shift = self.plan.shift.get(unit.name)
        if not self.plan.profile.around:
            self._shift(unit, shift)
            return
        if unit.bias is not None:
            self._row(unit, unit.bias, weight, channels, shift)
            return
        bias = unit.node.inputs[2] if len(unit.node.inputs) > 2 else None
        old = g.constant(bias)
        if unit.node.op_type == "MatMul" or (old is None and shift is None):
            return
        array = np.zeros(channels, np.float32) if old is None else np.broadcast_to(old.reshape(-1), (channels,))
        name = (bias.name if bias is not None else None) or f"{unit.name}_bias"
        value = self._stored_bias(unit, name, array, weight, shift)
        unit.node.resize_inputs(3)
        unit.node.replace_input_with(2, value)

    def _shift(self, unit: Unit, shift: np.ndarray | None) -> None:
        """Add ``shift`` to a bias that stays in float."""
        target = unit.bias or unit.node
        index = 2 if unit.bias is None else (0 if g.is_constant(unit.bias.inputs[0]) else 1)
        if shift is None or (unit.bias is None and unit.node.op_type == "MatMul"):
            return
        bias = target.inputs[index] if len(target.inputs) > index else None
        old = g.constant(bias)
        name = (bias.name if bias is not None else None) or f"{unit.name}_bias"
        moved = (shift if old is None else old + shift).astype(np.float32)
        if index == 2:
            target.resize_inputs(3)
        target.replace_input_with(index, g.add_constant(self.graph, name, moved))

    def _stored_bias(
        self, unit: Unit, name: str, array: np.ndarray, weight: QParams, shift: np.ndarray | None
    ) -> ir.Value:
        moved = (array if shift is None else array + shift).astype(np.float32)
        params = bias_params(weight, self.params(unit.inputs[0]).scale, len(moved))
        return self._dequantized(unit, name, quantize(moved, params), params)

    def _row(self, unit: Unit, row: ir.Node, weight: QParams, channels: int, shift: np.ndarray | None) -> None:
        """The row added behind a MatMul: shifted, or merged into a Gemm where ONNX Runtime would make a float Gemm."""
        index = 0 if g.is_constant(row.inputs[0]) else 1
        kept, constant = g.constant(row.inputs[index]), row.inputs[index]
        assert kept is not None and constant is not None
        shape = g.known_shape(row.outputs[0])
        guessed = row.outputs[0].name in self.plan.guessed
        if guessed or shape is None or (len(shape) != 2 and None in shape):
            if shift is not None:
                value = g.add_constant(self.graph, f"{constant.name}", (kept + shift).astype(np.float32))
                row.replace_input_with(index, value)
            return
        bias = self._stored_bias(unit, f"{constant.name}", kept, weight, shift)
        merge_row(self.graph, unit.node, row, bias, unit.name)

    def _dequantized(self, unit: Unit, name: str, stored: np.ndarray, params: QParams) -> ir.Value:
        """A DequantizeLinear of a new constant."""
        inputs = [
            g.add_constant(self.graph, f"{name}_quantized", stored),
            g.add_constant(self.graph, f"{name}_scale", params.scale),
            g.add_constant(self.graph, f"{name}_zero_point", params.zero_point),
        ]
        attributes = {} if params.axis is None else {"axis": params.axis}
        node = g.add_node(self.graph, "DequantizeLinear", inputs, before=unit.node, hint=name, attributes=attributes)
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(stored.shape)
        return node.outputs[0]


def merge_row(graph: ir.Graph, node: ir.Node, row: ir.Node, bias: ir.Value, name: str) -> None:
    """Make one Gemm of a MatMul and the Add ``row`` behind it; ``bias`` is what the Gemm adds instead.

    The MatMul reads a DequantizeLinear and a matrix; with an input of other than two axes, the integers are reshaped,
    for which the shape of the result must be known.
    """
    source, stored_weight = node.inputs[0], node.inputs[1]
    shape = g.known_shape(row.outputs[0])
    assert source is not None and stored_weight is not None and stored_weight.shape is not None and shape is not None
    if len(shape) != 2:
        dq = source.producer()
        assert dq is not None
        form = g.add_constant(graph, f"{name}_matrix", np.array([-1, stored_weight.shape[0]], np.int64))
        flat = g.add_node(graph, "Reshape", [dq.inputs[0], form], before=node, hint=name)
        if dq.inputs[0] is not None and dq.inputs[0].dtype is not None:
            flat.outputs[0].dtype = dq.inputs[0].dtype
        inputs = [flat.outputs[0], *dq.inputs[1:]]
        source = g.add_node(graph, "DequantizeLinear", inputs, before=node, hint=name).outputs[0]
        source.dtype = ir.DataType.FLOAT
    end = gemm = g.add_node(graph, "Gemm", [source, stored_weight, bias], before=row, hint=name)
    gemm.name = name
    gemm.outputs[0].dtype = ir.DataType.FLOAT
    if len(shape) != 2:
        form = g.add_constant(graph, f"{name}_shape", np.array(shape, np.int64))
        end = g.add_node(graph, "Reshape", [gemm.outputs[0], form], before=row, hint=name)
    end.outputs[0].type, end.outputs[0].shape = row.outputs[0].type, row.outputs[0].shape
    g.replace(row.outputs[0], end.outputs[0])


def moves_values(node: ir.Node) -> bool:
    """True for an operator that only moves or selects the values of its first input."""
    return g.is_op(node, *MOVES) or (g.is_op(node, "Resize") and g.attribute(node, "mode", "nearest") == "nearest")
