"""Which products of a model really run as integer kernels: read off the graph that the execution provider executes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim import cost, runtime
from onnxslim.errors import UsageError
from onnxslim.graph import is_constant, is_op
from onnxslim.selectors import Finding, findings, wrong_results
from onnxslim.units import NEVER, PRODUCTS, name_all_nodes

# Position of the weight among the inputs of the kernels that multiply integers.
KERNELS = {
    "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3, "MatMulIntegerToFloat": 1, "MatMulInteger": 1, "ConvInteger": 1,
    "DynamicQuantizeMatMul": 1, "DynamicQuantizeLSTM": 1, "QAttention": 1,
}  # fmt: skip
# These read integer weights and compute in float.
WEIGHT_ONLY = {"MatMulNBits", "GatherBlockQuantized"}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A product: its kernel when it runs on integers, else the rule that stopped it and the reason."""

    name: str
    op_type: str
    macs: int
    kernel: str | None
    rule: str | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Proof:
    """What an execution provider makes of the products of a model.

    Attributes:
        layers: every product, in the order of the graph.
        wrong: integer kernels that compute something else than the file says.
    """

    ep: str
    layers: tuple[Layer, ...]
    wrong: tuple[Finding, ...]

    @property
    def integer(self) -> tuple[Layer, ...]:
        """The products that run on integers."""
        return tuple(layer for layer in self.layers if layer.kernel is not None)

    @property
    def fraction(self) -> float:
        """Share of the multiply-accumulates that run on integers; of the layers, where no MACs could be counted."""
        total = sum(layer.macs for layer in self.layers)
        if total:
            return sum(layer.macs for layer in self.integer) / total
        return len(self.integer) / max(len(self.layers), 1)

    @property
    def kernels(self) -> dict[str, int]:
        """How many products run as which integer kernel."""
        counts: dict[str, int] = {}
        for layer in self.integer:
            assert layer.kernel is not None
            counts[layer.kernel] = counts.get(layer.kernel, 0) + 1
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "ep": self.ep,
            "layers": len(self.layers),
            "integer_layers": len(self.integer),
            "integer_macs_fraction": round(self.fraction, 4),
            "integer_kernels": self.kernels,
            "not_integer": [
                {"node": x.name, "op_type": x.op_type, "macs": x.macs, "rule": x.rule, "reason": x.reason}
                for x in self.layers
                if x.kernel is None
            ],
            "wrong": [dataclasses.asdict(f) for f in self.wrong],
        }


def prove(model: ir.Model, feed: Mapping[str, np.ndarray] | None = None, *, ep: str = "cpu", threads: int = 0) -> Proof:
    """Dump the graph that ``ep`` executes and find every product of ``model`` in it.

    Args:
        feed: a sample, for the shapes that multiply-accumulates are counted with.

    Raises:
        UsageError: an execution provider whose kernels cannot be seen in its graph.
        ModelError: ONNX Runtime refuses the model.
    """
    if ep != "cpu":
        raise UsageError(f"the kernels of {ep!r} cannot be seen: integer kernels are counted on cpu")
    draft = model.clone()
    name_all_nodes(draft)
    products = [n for n in draft.graph.all_nodes() if _is_product(n)]
    # Weights are matched by name too, and ONNX Runtime counts a weight that several nodes read once for each.
    by_name, by_weight, weight_only = _kernels(runtime.optimized(draft, ep=ep, threads=threads))
    macs = {row.name: row.macs for row in cost.analyze(draft, feed or {}).table}
    layers: list[Layer] = []
    wrong: list[Finding] = []
    for node in products:
        name = node.name or ""
        kernel = by_name.get(name) or by_weight.get(_weight_name(node))
        if node.op_type in KERNELS:
            kernel = node.op_type
        if kernel is not None:
            layers.append(Layer(name, node.op_type, macs.get(name, 0), kernel))
            if is_op(node, *PRODUCTS):
                wrong += wrong_results(node)
            continue
        rule, reason = _why(node, name in weight_only)
        layers.append(Layer(name, node.op_type, macs.get(name, 0), None, rule, reason))
    return Proof(ep, tuple(layers), tuple(wrong))


def _is_product(node: ir.Node) -> bool:
    if node.op_type in KERNELS or node.op_type in WEIGHT_ONLY:
        return node.op_type != "GatherBlockQuantized"
    return is_op(node, *PRODUCTS, *NEVER) and not _folded(node)


def _folded(node: ir.Node) -> bool:
    """Computed once, when the model is loaded."""
    stack, seen = [node], {node}
    while stack:
        for value in stack.pop().inputs:
            producer = value.producer() if value is not None else None
            if value is None or is_constant(value):
                continue
            if producer is None:
                return False
            if producer not in seen:
                seen.add(producer)
                stack.append(producer)
    return True


def _kernels(executed: ir.Model) -> tuple[dict[str, str], dict[str, str], set[str]]:
    by_name: dict[str, str] = {}
    by_weight: dict[str, str] = {}
    weight_only: set[str] = set()
    for node in executed.graph.all_nodes():
        name = runtime.original_name(node.name or "").removesuffix("/MatMulAddFusion")
        if node.op_type in WEIGHT_ONLY:
            weight_only.add(name)
        index = KERNELS.get(node.op_type)
        if index is None:
            continue
        by_name[name] = node.op_type
        value = node.inputs[index] if len(node.inputs) > index else None
        if value is not None and is_constant(value) and value.name:
            by_weight[value.name] = node.op_type
    return by_name, by_weight, weight_only


def _weight_name(node: ir.Node) -> str:
    """Name of the integers of a weight that ``node`` alone reads, else an empty text."""
    value = node.inputs[1] if len(node.inputs) > 1 else None
    producer = value.producer() if value is not None else None
    if producer is None or not is_op(producer, "DequantizeLinear") or len(producer.outputs[0].uses()) != 1:
        return ""
    integers = producer.inputs[0]
    return integers.name or "" if integers is not None and len(integers.uses()) == 1 else ""


def _why(node: ir.Node, weight_only: bool) -> tuple[str, str]:
    if node.op_type in WEIGHT_ONLY or weight_only:
        return "weight-only", "only its weight is stored as integers; MatMulNBits computes in float"
    if not is_op(node, *PRODUCTS):
        return "no-kernel", f"{node.op_type} has no static integer kernel"
    found = findings(node)
    if not found:
        return "unknown", "ONNX Runtime left it in float, and no rule known here says why"
    return found[0].rule, found[0].reason


def share(text: str) -> float:
    """``95%`` or ``0.95`` as a number between 0 and 1.

    Raises:
        UsageError: neither.
    """
    number = text.strip()
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise UsageError(f"{text!r}: give a share such as 95% or 0.95")
    return value


def missed(proof: Proof, wanted: float) -> str | None:
    """A line that says by how much ``proof`` misses the ``wanted`` share, and the dearest layers that stay in float."""
    if proof.fraction >= wanted:
        return None
    left: Sequence[Layer] = sorted((x for x in proof.layers if x.kernel is None), key=lambda x: -x.macs)
    names = "; ".join(f"{x.name}: {x.reason}" for x in left[:3])
    more = f"; and {len(left) - 3} more" if len(left) > 3 else ""
    return f"{proof.fraction:.1%} of the MACs run on integers, {wanted:.1%} are required ({names}{more})"
