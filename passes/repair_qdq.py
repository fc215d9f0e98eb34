"""repair_qdq: Q/DQ models of other tools made to run on integers, and to compute what they say."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim import calibration, integer, ranges
from onnxslim import graph as g
from onnxslim.calibration import Histogram
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.errors import ModelError
from onnxslim.qdq import merge_row, moves_values
from onnxslim.quantization import (
    QParams,
    activation_params,
    bias_params,
    dequantize,
    may_saturate,
    quantize,
    store_weight,
    weight_params,
)
from onnxslim.saturation import neighbours
from onnxslim.selectors import (
    Finding,
    Stored,
    bounds,
    findings,
    of_dequantize,
    of_quantize,
    result,
    weight_axis,
    weight_constant,
    wrong_results,
)
from onnxslim.units import PRODUCTS, name_all_nodes, row_bias

# The share of its range that a weight fills that was scaled to it, whatever the tool rounded.
FULL = 0.94
# A repair can lay another defect open, once per kind of value: activation, weight, bias.
ROUNDS = 4
UNREPAIRED = "not repaired: "


@dataclasses.dataclass(frozen=True)
class RepairQdq(Pass):
    """Repairs what keeps the Q/DQ groups of a quantized model from running as integer kernels.

    Looks at the graph that ONNX Runtime's CPU provider really executes, and for every Conv, Gemm and MatMul that stays
    in float at the rule that it breaks. Signed activations that several operators read become unsigned, which changes
    no value; storing behind a Relu or Clip gets a range that ends where the Relu or Clip does; other readers of a
    result read what is stored; biases are stored again with the scale that the kernel takes for granted; the scales of
    a weight go to its output channels; a result that is not stored gets a range from the calibration data. Kernels
    that already run on integers are repaired where they compute something else than the file says.

    A weight or input that is not stored at all is somebody's decision and stays as it is.
    """

    name: ClassVar[str] = "repair_qdq"
    effect: ClassVar[Effect] = Effect.LOSSY
    last: ClassVar[bool] = True

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        if not any(g.is_op(n, "DequantizeLinear") for n in model.graph.all_nodes()):
            return Outcome({"found": 0, "repaired": 0}, [Skip("*", "the model has no DequantizeLinear")])
        name_all_nodes(model)
        feed = ctx.calibration.feed(ctx.calibration[0]) if len(ctx.calibration) else {}
        try:
            before = integer.prove(model, feed, threads=ctx.threads)
        except ModelError as error:
            return Outcome({"found": 0, "repaired": 0}, [Skip("*", f"its kernels cannot be seen: {error}")])
        blocked = {layer.name for layer in before.layers if layer.kernel is None}
        repairs = _Repairs(model, ctx)
        found = {f for _, f in _items(model, blocked)}
        changed = False
        for _ in range(ROUNDS):
            if not repairs.round(_items(model, blocked)):
                break
            changed = True
        g.remove_dead(model.graph)
        after = integer.prove(model, feed, threads=ctx.threads) if changed else before
        left = {(f.node, f.rule) for _, f in _items(model, blocked)}
        repaired = Counter(f.rule for f in found if (f.node, f.rule) not in left)
        skipped = [
            Skip(x.name, f"{UNREPAIRED}{repairs.refused.get((x.name, x.rule or ''), x.reason)}")
            for x in after.layers
            if x.kernel is None and x.name in blocked and x.op_type in PRODUCTS
        ]
        skipped += [Skip(f.node, f"{UNREPAIRED}{repairs.refused.get((f.node, f.rule), f.reason)}") for f in after.wrong]
        stats = {
            "found": len(found),
            "repaired": repaired.total(),
            "rules_found": dict(Counter(f.rule for f in found)),
            "rules_repaired": dict(repaired),
            "integer_layers": len(after.integer),
            "integer_macs_fraction": round(after.fraction, 4),
            "integer_macs_fraction_before": round(before.fraction, 4),
        }
        return Outcome(stats, skipped)


def _items(model: ir.Model, blocked: set[str]) -> list[tuple[ir.Node, Finding]]:
    """Every product that has something to repair, with what."""
    items = []
    for node in model.graph.all_nodes():
        if g.is_op(node, *PRODUCTS):
            broken = findings(node) if node.name in blocked else wrong_results(node)
            items += [(node, f) for f in broken]
    return items


class _Repairs:
    """One method per rule; each returns True when it changed something, or notes why it refused."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self.model = model
        self.graph = model.graph
        self.ctx = ctx
        self.refused: dict[tuple[str, str], str] = {}
        self._ranges: dict[str, QParams] = {}

    def round(self, items: list[tuple[ir.Node, Finding]]) -> int:
        """Repair ``items``; returns how many were."""
        methods: dict[str, Callable[[ir.Node], bool]] = {
            "signed-fan-out": self._unsign,
            "vector-scale": self._one_scale,
            "several-readers": self._only_reader,
            "saturation": self._saturate,
            "no-store": self._store,
            "weight-axis": self._turn_scales,
            "float-bias": self._store_bias,
            "bias-scale": self._store_bias,
            "matmul-add": self._merge_row,
        }
        self._measure([node for node, f in items if f.rule == "no-store"])
        count = 0
        for rule, method in methods.items():
            for node, finding in items:
                # An earlier repair may have taken care of it.
                if finding.rule != rule or node.graph is None or rule not in {f.rule for f in findings(node)}:
                    continue
                count += method(node)
        return count

    def _refuse(self, node: ir.Node, rule: str, reason: str) -> bool:
        self.refused[node.name or "", rule] = reason
        return False

    # Activations.

    def _unsign(self, node: ir.Node) -> bool:
        """Store the signed activations around ``node``, and all others with them, as u8: q + 128 everywhere."""
        changed = False
        for q in list(self.graph.all_nodes()):
            if not g.is_op(q, "QuantizeLinear") or g.is_constant(q.inputs[0]):
                continue
            chain = _integers(q.outputs[0])
            if chain is None:
                self._refuse(node, "signed-fan-out", f"{q.outputs[0].name!r} is read by more than DequantizeLinear")
                continue
            if all(_zero_type(n) is ir.DataType.INT8 for n in (q, *chain.ends)):
                self._shift(q, chain)
                changed = True
        return changed

    def _shift(self, q: ir.Node, chain: _Chain) -> None:
        for end in (q, *chain.ends):
            zero = g.constant(end.inputs[2]) if len(end.inputs) > 2 else None
            if zero is None:
                scale = g.constant(end.inputs[1])
                zero = np.zeros(() if scale is None else scale.shape, np.int8)
            value = g.add_constant(
                self.graph, f"{q.outputs[0].name}_zero_point", (zero.astype(np.int16) + 128).astype(np.uint8)
            )
            end.resize_inputs(3)
            end.replace_input_with(2, value)
        if "output_dtype" in q.attributes:
            g.set_attribute(q, "output_dtype", int(ir.DataType.UINT8))
        for value in chain.values:
            value.type = ir.TensorType(ir.DataType.UINT8)  # clones share type objects

    def _one_scale(self, node: ir.Node) -> bool:
        """A vector of equal scales is one scale."""
        stored = of_dequantize(node.inputs[0])
        if stored is None or stored.scale is None or stored.zero is None:
            return False
        if np.ptp(stored.scale) or np.ptp(stored.zero.astype(np.int32)):
            return self._refuse(node, "vector-scale", "its input has different scales along an axis")
        params = QParams(stored.scale.reshape(-1)[0], stored.zero.reshape(-1)[0])
        self._set(stored.node, params)
        return True

    def _set(self, end: ir.Node, params: QParams) -> None:
        """Give a QuantizeLinear or DequantizeLinear other parameters."""
        hint = end.outputs[0].name or end.op_type
        end.resize_inputs(3)
        end.replace_input_with(1, g.add_constant(self.graph, f"{hint}_scale", np.asarray(params.scale)))
        end.replace_input_with(2, g.add_constant(self.graph, f"{hint}_zero_point", np.asarray(params.zero_point)))
        if params.axis is None:
            end.attributes.pop("axis", None)
        else:
            g.set_attribute(end, "axis", params.axis)

    def _only_reader(self, node: ir.Node) -> bool:
        """Let whoever reads the result beside its QuantizeLinear read what is stored."""
        value, _ = result(node)
        q = next(use.node for use in value.uses() if g.is_op(use.node, "QuantizeLinear"))
        producer = value.producer()
        if producer is None or producer.graph is None or not all(map(g.is_constant, q.inputs[1:])):
            return self._refuse(node, "several-readers", f"the scale of {q.outputs[0].name!r} is computed")
        if q.graph is not producer.graph:
            return self._refuse(node, "several-readers", f"{value.name!r} is stored in a branch only")
        # The others may stand before it.
        producer.graph.remove(q)
        producer.graph.insert_after(producer, q)
        self._pair(value, q)
        return True

    def _pair(self, value: ir.Value, q: ir.Node) -> None:
        """Make ``q`` the only reader of ``value``: all others read a DequantizeLinear behind it."""
        inputs = [q.outputs[0], *q.inputs[1:]]
        dq = g.add_node(self.graph, "DequantizeLinear", inputs, after=q, hint=value.name or "", like=value)
        dq.attributes.update({k: a for k, a in q.attributes.items() if k == "axis"})
        g.replace(value, dq.outputs[0])
        q.replace_input_with(0, value)

    def _saturate(self, node: ir.Node) -> bool:
        """Let the range of what is stored end where the Relu or Clip behind ``node`` ends."""
        value, tail = result(node)
        stored = of_quantize(value)
        if stored is None or tail is None or stored.scale is None or stored.zero is None or stored.axis is not None:
            return False
        old, (low, high) = stored.params, bounds(tail)
        # Rounding to nearest may have stored a little more than the bound; that little is given up.
        params = activation_params(max(old.low, low), min(old.high, high))
        ends = self._sharing(stored.node, old)
        if ends is None:
            return self._refuse(node, "saturation", f"{value.name!r} is read by more than DequantizeLinear")
        if _zero_type(stored.node) is not ir.DataType.UINT8 and not self._unsign(node):
            return False
        ratios = []
        for end in ends:
            scale = g.constant(end.inputs[1])
            assert scale is not None
            ratios.append(np.float32(scale.reshape(()) / old.scale))
        for end, ratio in zip(ends, ratios, strict=True):
            self._set(end, dataclasses.replace(params, scale=np.asarray(params.scale * ratio, np.float32)))
        return True

    def _sharing(self, q: ir.Node, params: QParams) -> list[ir.Node] | None:
        """``q`` and every QuantizeLinear and DequantizeLinear that must keep the parameters of ``q``.

        Operators that only move values have the same parameters on both sides.
        """
        ends: list[ir.Node] = []
        stack = [q]
        while stack:
            start = stack.pop()
            chain = _integers(start.outputs[0])
            if chain is None:
                return None
            scales = [g.constant(end.inputs[1]) for end in chain.ends]
            if any(scale is None or scale.size > 1 for scale in scales):
                return None
            ends += [start, *chain.ends]
            for end in chain.ends:
                for use in end.outputs[0].uses():
                    if use.idx or not moves_values(use.node):
                        continue
                    for value in use.node.outputs:
                        further = of_quantize(value)
                        if further is not None and further.scale is not None and further.axis is None:
                            same = np.array_equal(further.scale.reshape(()), params.scale)
                            if same and further.node not in ends:
                                stack.append(further.node)
        return ends

    def _measure(self, nodes: Iterable[ir.Node]) -> None:
        """Find ranges for results that are not stored yet, in one pass over the data."""
        values = {v.name or "": v for v in (result(node)[0] for node in nodes) if v.graph is self.graph}
        missing = [name for name in values if name not in self._ranges]
        if self.ctx.synthetic or not missing or not len(self.ctx.calibration):
            return
        histograms = {name: Histogram() for name in missing}
        calibration.collect(self.model, {n: [h] for n, h in histograms.items()}, self.ctx)
        for name, histogram in histograms.items():
            found = ranges.candidates(histogram)
            if found:
                self._ranges[name] = activation_params(*found.get("mse", found["minmax"]))

    def _store(self, node: ir.Node) -> bool:
        value, tail = result(node)
        params = self._ranges.get(value.name or "")
        if value.graph is not self.graph:
            return self._refuse(node, "no-store", "its result is inside a subgraph and not stored")
        if params is None:
            why = "no calibration data: its range would be a guess" if self.ctx.synthetic else "it never was finite"
            return self._refuse(node, "no-store", f"its result {value.name!r} is not stored, and {why}")
        if tail is not None:
            low, high = bounds(tail)
            params = activation_params(max(params.low, low), min(params.high, high))
        name = value.name or ""
        constants = [
            g.add_constant(self.graph, f"{name}_scale", params.scale),
            g.add_constant(self.graph, f"{name}_zero_point", params.zero_point),
        ]
        q = g.add_node(self.graph, "QuantizeLinear", [value, *constants], after=value.producer(), hint=name)
        q.outputs[0].dtype, q.outputs[0].shape = ir.DataType.UINT8, value.shape
        self._pair(value, q)
        return True

    # Weights and biases.

    def _turn_scales(self, node: ir.Node) -> bool:
        """Put the scales of a weight along its output channels.

        Where the integers fill their range along the output channels and not along the axis that the file names, the
        file names the wrong axis. Otherwise it is taken at its word, and the weight is stored again.
        """
        stored = of_dequantize(node.inputs[1])
        assert stored is not None
        integers = weight_constant(stored)
        if integers is None or stored.axis is None or stored.scale is None or stored.zero is None:
            return False
        right = weight_axis(node, integers.ndim)
        if stored.scale.size == integers.shape[right] and not _full(integers, stored.axis) and _full(integers, right):
            params = QParams(stored.scale, np.broadcast_to(stored.zero, stored.scale.shape), right)
            values = [stored.integers, None]
        else:
            array = dequantize(integers, stored.params)
            # Weights that were kept small for CPUs without VNNI stay so.
            rows = np.moveaxis(integers, right, 0).reshape(integers.shape[right], -1)
            near = neighbours(node, integers.shape, right)
            pairs = None if may_saturate(rows, near) else near
            params = weight_params(array, right, pairs=pairs)
            again = store_weight(array, right, params, pairs)
            values = [g.add_constant(self.graph, f"{stored.integers.name}_stored", again), None]
        self._own(node, 1, stored, values[0], params)
        return True

    def _own(self, node: ir.Node, index: int, stored: Stored, integers: ir.Value | None, params: QParams) -> None:
        """Let input ``index`` of ``node`` read ``integers`` through a DequantizeLinear of its own."""
        old = node.inputs[index]
        inputs = [
            integers,
            g.add_constant(self.graph, f"{stored.integers.name}_scale", params.scale),
            g.add_constant(self.graph, f"{stored.integers.name}_zero_point", np.asarray(params.zero_point)),
        ]
        attributes = {} if params.axis is None else {"axis": params.axis}
        hint = f"{stored.integers.name}"
        dq = g.add_node(self.graph, "DequantizeLinear", inputs, before=node, attributes=attributes, hint=hint, like=old)
        node.replace_input_with(index, dq.outputs[0])

    def _store_bias(self, node: ir.Node) -> bool:
        """Store a bias as int32 with the scale of input times weight."""
        first, second = of_dequantize(node.inputs[0]), of_dequantize(node.inputs[1])
        bias = node.inputs[2]
        assert first is not None and second is not None and bias is not None
        rule = "bias-scale" if of_dequantize(bias) is not None else "float-bias"
        array = _values(bias)
        if array is None or first.scale is None or second.scale is None or first.scale.size > 1:
            return self._refuse(node, rule, f"its bias {bias.name!r} or a scale is computed")
        weight = weight_constant(second)
        if weight is None or any(size != 1 for size in array.shape[:-1]):
            return self._refuse(node, rule, f"its bias {bias.name!r} is not a row of constants")
        channels = weight.shape[weight_axis(node, weight.ndim)]
        row = np.broadcast_to(array.reshape(-1), (channels,))
        stored = self._stored_row(node, rule, row, bias_params(second.params, first.scale.reshape(()), channels), node)
        if stored is None:
            return False
        node.replace_input_with(2, stored)
        return True

    def _stored_row(
        self, node: ir.Node, rule: str, row: np.ndarray, params: QParams, before: ir.Node
    ) -> ir.Value | None:
        """``row`` in 32 bits, read back in front of ``before``; None where it does not fit in."""
        if np.abs(row / params.scale).max(initial=0) > np.iinfo(np.int32).max:
            self._refuse(node, rule, "its bias does not fit in 32 bits at the scale it needs")
            return None
        name = f"{node.name}_bias"
        inputs = [
            g.add_constant(self.graph, f"{name}_stored", quantize(row, params)),
            g.add_constant(self.graph, f"{name}_scale", params.scale),
            g.add_constant(self.graph, f"{name}_zero_point", params.zero_point),
        ]
        attributes = {} if params.axis is None else {"axis": params.axis}
        dq = g.add_node(self.graph, "DequantizeLinear", inputs, before=before, attributes=attributes, hint=name)
        dq.outputs[0].dtype, dq.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(row.shape)
        return dq.outputs[0]

    def _merge_row(self, node: ir.Node) -> bool:
        """Make a Gemm with a stored bias of a MatMul and the row added behind it."""
        first, second = of_dequantize(node.inputs[0]), of_dequantize(node.inputs[1])
        weight = weight_constant(second) if second is not None else None
        row = row_bias(node.outputs[0], None if weight is None else weight.shape[-1])
        if first is None or second is None or weight is None or row is None or first.scale is None:
            return False
        if weight.ndim != 2 or first.scale.size > 1:
            return self._refuse(node, "matmul-add", "its weight is not a matrix, or its input has several scales")
        array = g.constant(row.inputs[0] if g.is_constant(row.inputs[0]) else row.inputs[1])
        shape = g.known_shape(row.outputs[0])
        assert array is not None
        if shape is None or (len(shape) != 2 and None in shape):
            return self._refuse(node, "matmul-add", "the shape of its result is not known")
        params = bias_params(second.params, first.scale.reshape(()), weight.shape[1])
        bias = self._stored_row(node, "matmul-add", array, params, row)
        if bias is None:
            return False
        merge_row(self.graph, node, row, bias, node.name or "")
        return True


@dataclasses.dataclass
class _Chain:
    """Integer values that hold the same numbers, and the DequantizeLinear at the ends."""

    values: list[ir.Value]
    ends: list[ir.Node]


def _integers(value: ir.Value) -> _Chain | None:
    """What a QuantizeLinear writes, followed through operators that move it; None where anything else reads it."""
    chain = _Chain([value], [])
    for current in chain.values:
        if current.is_graph_output():
            return None
        for use in current.uses():
            if g.is_op(use.node, "DequantizeLinear") and use.idx == 0:
                chain.ends.append(use.node)
            elif moves_values(use.node) and use.idx == 0 and use.node.op_type != "MaxPool":
                chain.values += use.node.outputs
            else:
                return None
    return chain


def _zero_type(node: ir.Node) -> ir.DataType | None:
    """Storage type of a QuantizeLinear or DequantizeLinear whose parameters are constants."""
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None:
        return zero.dtype if g.is_constant(zero) else None
    integers = node.outputs[0] if g.is_op(node, "QuantizeLinear") else node.inputs[0]
    return integers.dtype if integers is not None else None


def _full(integers: np.ndarray, axis: int) -> bool:
    """Whether every channel along ``axis`` fills the range of the weight, 8 or 7 bits, as with scales of that axis."""
    peaks = np.abs(np.moveaxis(integers, axis, 0).reshape(integers.shape[axis], -1).astype(np.int32)).max(1)
    return bool((peaks[peaks > 0] >= FULL * peaks.max(initial=0)).all())


def _values(value: ir.Value) -> np.ndarray | None:
    """The numbers of a constant or of a constant behind a DequantizeLinear."""
    stored = of_dequantize(value)
    if stored is None:
        return g.constant(value)
    integers = g.constant(stored.integers)
    if integers is None or stored.scale is None or stored.zero is None:
        return None
    params = stored.params
    if params.axis is not None:
        params = dataclasses.replace(params, axis=0)
    return dequantize(integers, params)
