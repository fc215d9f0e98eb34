"""The rules by which ONNX Runtime's CPU provider decides whether a product runs as one integer kernel.

A product (Conv, Gemm, MatMul) runs on integers when it reads DequantizeLinear, and when what reads its result is a
QuantizeLinear or, for Gemm and MatMul, nothing that would have to be merged into it. `findings` names every rule that
a product breaks. Two of them do not even cost speed alone: the kernel takes the scales of a weight for those of the
output channels, and the scale of a Gemm's bias for the product of the other two, whatever the file says.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxslim.graph import attribute, constant, is_constant, is_op, known_shape, only_user
from onnxslim.quantization import QParams, quantize
from onnxslim.units import row_bias, saturating

# Relative difference between a bias scale and the product of the other two that is not rounding.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Finding:
    """A rule that a product breaks.

    Attributes:
        node: name of the product.
        rule: name of the rule, see `RULES`.
        reason: what is wrong, with the names of the values.
    """

    node: str
    rule: str
    reason: str


RULES = {
    "float-input": "the activation must come from a DequantizeLinear",
    "float-weight": "the weight must come from a DequantizeLinear",
    "computed-scale": "scales and zero points must be constants",
    "vector-scale": "activations have one scale",
    "storage-type": "activations and weights have 8 bits and float32 scales",
    "gemm-attributes": "alpha and beta are 1, A is not transposed",
    "weight-axis": "the scales of a weight belong to its output channels",
    "float-bias": "without a stored result, the bias must be a stored int32 constant",
    "bias-scale": "the scale of an int32 bias is the product of the scales of input and weight",
    "signed-fan-out": "on x86, s8 activations become u8 only where one operator reads them",
    "several-readers": "only the QuantizeLinear may read the result",
    "no-store": "the result must go to a QuantizeLinear",
    "saturation": "storing must saturate where the Relu or Clip in front of it does",
    "matmul-add": "a row added behind a MatMul makes it a Gemm, whose bias must be stored",
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A value that stands behind a DequantizeLinear (or, for `of_quantize`, in front of a QuantizeLinear).

    Attributes:
        node: the DequantizeLinear or QuantizeLinear.
        integers: the value that holds the integers.
        scale, zero: None when they are not constants; ``zero`` is 0 where the file leaves it out.
        axis: axis of the scales; None for one scale.
    """

    node: ir.Node
    integers: ir.Value
    scale: np.ndarray | None
    zero: np.ndarray | None
    axis: int | None

    @property
    def dtype(self) -> str:
        """Name of the storage type, such as ``INT8``."""
        kind = self.zero_type or self.integers.dtype
        return "unknown" if kind is None else kind.name

    @property
    def zero_type(self) -> ir.DataType | None:
        """Type of the zero point, if there is one."""
        value = self.node.inputs[2] if len(self.node.inputs) > 2 else None
        return None if value is None else value.dtype

    @property
    def whole(self) -> bool:
        """Whether what is stored is of a type of whole numbers that NumPy has."""
        return self.zero is not None and self.zero.dtype.kind in "iu"

    @property
    def params(self) -> QParams:
        """Scale and zero point; both must be constants."""
        assert self.scale is not None and self.zero is not None
        if self.axis is None:
            return QParams(self.scale.reshape(()), self.zero.reshape(()))
        return QParams(self.scale, np.broadcast_to(self.zero, self.scale.shape), self.axis)


def of_dequantize(value: ir.Value | None) -> Stored | None:
    """How ``value`` is stored, if a DequantizeLinear gives it."""
    node = value.producer() if value is not None else None
    if node is None or not is_op(node, "DequantizeLinear") or node.inputs[0] is None:
        return None
    return _stored(node, node.inputs[0])


def of_quantize(value: ir.Value) -> Stored | None:
    """How ``value`` is stored, if a QuantizeLinear is all that reads it."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or not is_op(uses[0].node, "QuantizeLinear"):
        return None
    return _stored(uses[0].node, uses[0].node.outputs[0])


def _stored(node: ir.Node, integers: ir.Value) -> Stored:
    scale = constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = constant(given) if given is not None else None
    if given is None and scale is not None:
        kind = integers.dtype or ir.DataType.UINT8
        zero = np.zeros(scale.shape, kind.numpy())
    axis = None
    if scale is not None and scale.size > 1:
        rank = len(known_shape(node.inputs[0]) or ())
        axis = int(attribute(node, "axis", 1))
        axis = axis + rank if axis < 0 else axis
    return Stored(node, integers, scale, zero, axis)


def weight_axis(node: ir.Node, rank: int = 2) -> int:
    """Axis of the output channels in the weight of a product, which has ``rank`` axes."""
    if is_op(node, "Conv"):
        return 0
    if is_op(node, "Gemm"):
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1


def weight_constant(stored: Stored) -> np.ndarray | None:
    """The integers of a stored weight, also where the file holds the float weight and a QuantizeLinear."""
    direct = constant(stored.integers)
    if direct is not None:
        return direct
    q = stored.integers.producer()
    if q is None or not is_op(q, "QuantizeLinear") or stored.scale is None or not stored.whole:
        return None
    source = constant(q.inputs[0])
    if source is None:
        return None
    return quantize(source, stored.params)


def readers(integers: ir.Value) -> int:
    """How many operators read a stored activation, through however many DequantizeLinear."""
    count = 0
    for use in integers.uses():
        if is_op(use.node, "DequantizeLinear"):
            value = use.node.outputs[0]
            count += len(value.uses()) + value.is_graph_output()
        else:
            count += 1
    return count


def result(node: ir.Node) -> tuple[ir.Value, ir.Node | None]:
    """The value that is to be stored, and the Relu or Clip between it and ``node``."""
    tail = saturating(node.outputs[0])
    return (node.outputs[0], None) if tail is None else (tail.outputs[0], tail)


def bounds(tail: ir.Node) -> tuple[float, float]:
    """Limits of a Relu or Clip."""
    if tail.op_type == "Relu":
        return 0.0, np.inf
    low, high = (constant(v) for v in (*tail.inputs[1:3], None, None)[:2])
    return (-np.inf if low is None else float(low.item())), (np.inf if high is None else float(high.item()))


def fits(params: QParams, tail: ir.Node) -> bool:
    """Whether storing with ``params`` saturates within the limits of ``tail``."""
    low, high = bounds(tail)
    slack = TOLERANCE * float(params.scale)
    return params.low >= low - slack and params.high <= high + slack


def findings(node: ir.Node) -> list[Finding]:
    """Every rule that a Conv, Gemm or MatMul breaks, the one that comes first in `RULES` first."""
    name = node.name or node.op_type
    broken: dict[str, str] = {}
    first, second = of_dequantize(node.inputs[0]), of_dequantize(node.inputs[1])
    for operand, stored, rule in ((node.inputs[0], first, "float-input"), (node.inputs[1], second, "float-weight")):
        if stored is None:
            kind = "weight" if is_constant(operand) else "operand"
            where = rule if kind == "weight" else "float-input"
            broken.setdefault(where, f"its {kind} {operand.name if operand else ''!r} is not stored as integers")
            continue
        if stored.scale is None or stored.zero is None:
            broken.setdefault("computed-scale", f"scale or zero point of {stored.integers.name!r} is computed")
            continue
        weight = weight_constant(stored)
        if weight is None:
            _activation(stored, node.op_type, broken)
        else:
            _weight(node, stored, weight, broken)
    if is_op(node, "Gemm") and (
        attribute(node, "alpha", 1.0) != 1 or attribute(node, "beta", 1.0) != 1 or attribute(node, "transA", 0)
    ):
        broken["gemm-attributes"] = "Gemm with alpha, beta or transA has no integer kernel"
    if first is not None and second is not None:
        _result(node, broken)
        _bias(node, first, second, broken)
    return [Finding(name, rule, broken[rule]) for rule in RULES if rule in broken]


def _activation(stored: Stored, op: str, broken: dict[str, str]) -> None:
    assert stored.scale is not None
    name = stored.integers.name
    if stored.scale.size > 1:
        broken.setdefault("vector-scale", f"{name!r} has {stored.scale.size} scales")
    if stored.dtype not in ("INT8", "UINT8") or stored.scale.dtype != np.float32:
        broken.setdefault(
            "storage-type", f"{name!r} is {stored.dtype} with {stored.scale.dtype} scales: no kernel for {op}"
        )
    if stored.dtype == "INT8" and readers(stored.integers) > 1:
        broken.setdefault("signed-fan-out", f"{name!r} is s8 and has {readers(stored.integers)} readers")


def _weight(node: ir.Node, stored: Stored, weight: np.ndarray, broken: dict[str, str]) -> None:
    assert stored.scale is not None
    if stored.dtype not in ("INT8", "UINT8") or stored.scale.dtype != np.float32:
        broken.setdefault(
            "storage-type", f"its weight is {stored.dtype} with {stored.scale.dtype} scales: no kernel for it"
        )
    elif attribute(stored.node, "block_size", 0):
        broken.setdefault("storage-type", "its weight has one scale per block: the kernel computes in float")
    elif stored.axis is not None and stored.axis != weight_axis(node, weight.ndim):
        right = weight_axis(node, weight.ndim)
        broken["weight-axis"] = f"its weight has scales along axis {stored.axis}; the output channels are axis {right}"


def _result(node: ir.Node, broken: dict[str, str]) -> None:
    value, tail = result(node)
    stored = of_quantize(value)
    if stored is not None:
        if stored.scale is None or stored.zero is None:
            broken.setdefault("computed-scale", f"scale or zero point of {stored.integers.name!r} is computed")
            return
        _activation(stored, node.op_type, broken)
        if tail is not None and stored.axis is None and stored.whole and not fits(stored.params, tail):
            low, high = stored.params.low, stored.params.high
            broken["saturation"] = (
                f"{tail.op_type} {tail.name!r} does not end where storing {value.name!r} does: [{low:.4g}, {high:.4g}]"
            )
        return
    who = [use.node.op_type for use in value.uses()] + ["a graph output"] * value.is_graph_output()
    # A Relu or Clip with one reader is looked through for the QuantizeLinear; any other is left to run in float.
    blocking = is_op(node, "Conv") or (tail is not None and only_user(value) is not None)
    if blocking and "QuantizeLinear" in who:
        who.remove("QuantizeLinear")
        broken["several-readers"] = f"besides a QuantizeLinear, {', '.join(who)} reads {value.name!r}"
    elif blocking:
        named = ", ".join(dict.fromkeys(who)) or "nobody"
        broken["no-store"] = f"its result {value.name!r} is not stored: {named} reads it"
    elif is_op(node, "MatMul"):
        width = (known_shape(node.inputs[1]) or (None,))[-1]
        row = row_bias(value, width)
        if row is not None and of_quantize(row.outputs[0]) is None:
            broken["matmul-add"] = f"ONNX Runtime makes a float Gemm of it and the Add of {row.name!r}"


def _bias(node: ir.Node, first: Stored, second: Stored, broken: dict[str, str]) -> None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return
    stored = of_dequantize(bias)
    if stored is None or stored.dtype != "INT32":
        if is_op(node, "Gemm") and of_quantize(result(node)[0]) is None:
            broken.setdefault("float-bias", f"its bias {bias.name!r} is not stored as int32")
        return
    if any(s is None for s in (stored.scale, first.scale, second.scale)):
        return
    assert stored.scale is not None and first.scale is not None and second.scale is not None
    wanted = np.float64(first.scale.reshape(-1)[0]) * second.scale.astype(np.float64).reshape(-1)
    scale = stored.scale.astype(np.float64).reshape(-1)
    if scale.size not in (1, wanted.size) and wanted.size != 1:
        return
    gap = float(np.max(np.abs(scale / np.maximum(wanted, 1e-300) - 1)))
    if gap > TOLERANCE or (stored.zero is not None and stored.zero.any()):
        broken["bias-scale"] = f"the scale of its int32 bias is not that of input times weight (off by {gap:.1%})"


def wrong_results(node: ir.Node) -> list[Finding]:
    """Rules that an integer kernel breaks without noticing: it computes something else than the file says."""
    return [f for f in findings(node) if f.rule in ("weight-axis", "bias-scale")]
