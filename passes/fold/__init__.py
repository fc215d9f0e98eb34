"""fold: linear algebra on weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxslim import graph as g
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.passes.fold.absorb import HEAVY, LIGHT, absorb_after, absorb_before
from onnxslim.passes.fold.branches import merge_branches
from onnxslim.passes.fold.chains import merge_chains
from onnxslim.passes.fold.pads import absorb_pads
from onnxslim.passes.fold.products import merge_products
from onnxslim.passes.fold.scales import absorb_scales
from onnxslim.passes.fold.work import Work
from onnxslim.passes.simplify import Simplify
from onnxslim.sharing import deduplicate_initializers

# In this order: an affine map goes into the operator before it (always exact) rather than into the one behind it, and
# into a convolution or matrix product rather than into a normalization.
RULES: Sequence[Callable[[Work], None]] = (
    absorb_pads,
    lambda work: absorb_after(work, HEAVY),
    lambda work: absorb_before(work, HEAVY),
    lambda work: absorb_after(work, LIGHT),
    lambda work: absorb_before(work, LIGHT),
    absorb_scales,
    merge_products,
    merge_branches,
    merge_chains,
)
# Elementwise broadcasting as it is known since operator set 7; before that it is an attribute.
OLDEST_OPSET = 7


@dataclasses.dataclass(frozen=True)
class Fold(Pass):
    """Folds constant arithmetic into the weights of the linear operators beside it: fewer nodes, the same function.

    BatchNormalization (inference), Mul, Div, Add, Sub and Neg by constants are affine maps ``s x + t`` per channel.

    * after Conv, ConvTranspose, Gemm, MatMul or a normalization: exact when the constants vary along the output
      channels only and nobody else reads the result in between.
    * before Conv, ConvTranspose, Gemm, MatMul or BatchNormalization: exact when the constants vary along the input
      channels only, do not broadcast the data, and either t = 0 or every output sees all taps (no zero padding;
      ConvTranspose 1x1 with stride 1). Before a padded operator, ``x + t / s`` stays when that saves a node.
    * runs of elementwise nodes: always exact; constants that round on purpose or whose product takes more bytes stay.
    * MatMul and Add: Gemm when the data is a matrix and the constant varies along the output channels only.
    * two linear operators in a row, one of them pointwise: exact when the pointwise one is the second, or when the
      second pads nothing or no bias stands in between. Only where the product has no more weights than the two.
    * branches that are added (3x3 + 1x1 + identity of RepVGG, ``W x + B (A x)`` of LoRA): exact when they read the same
      value at positions that the largest of them reads, with one stride, and give results of one size.
    * Mul and Div by a number, however far behind a linear operator (the scale of attention): exact when what stands in
      between is homogeneous, and everything that reads a value which changes is scaled, once.
    * Pad by constant amounts of spatial axes: zeros into Conv; zeros into AveragePool that counts them; into MaxPool
      what can never be the maximum of a window.

    A weight that several nodes share is changed in place only when all of them change alike; it is copied only when
    what disappears weighs as much. Nodes that ONNX Runtime fuses into one kernel (the constants of GELU and of a
    decomposed layer normalization) stay. The algebra is done in float64 and rounded once to the type of the weight.
    The file never grows, nor does the number of nodes. What was folded is simplified again, until neither finds more.
    """

    name: ClassVar[str] = "fold"
    effect: ClassVar[Effect] = Effect.ROUNDING
    wants: ClassVar[Sequence[str]] = ("simplify",)

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        version = g.opset(model)
        if version < OLDEST_OPSET:
            return Outcome(skipped=[Skip("*", f"operator set {version} is older than {OLDEST_OPSET}")])
        work = Work(model)
        while _fold(work):
            # What stood between two nodes that move data, or made two nodes differ, may be gone: that is for it to see,
            # and what it takes away may bring the next constant beside an operator.
            Simplify().apply(model, ctx)
            work.graphs = list(model.graphs())
        return Outcome(dict(sorted(work.done.items())), _left(work))


def _fold(work: Work) -> bool:
    """Apply every rule until none finds anything; True when one did."""
    deduplicate_initializers(work.model)  # how many read a weight decides what a copy of it costs
    before = work.done.total()
    reasons: list[dict[ir.Node, str]] = [{} for _ in RULES]
    idle = k = 0
    while idle < len(RULES):  # a rule that found nothing finds nothing until another one has changed the graph
        work.reasons = reasons[k] = {}
        done = work.done.total()
        RULES[k](work)
        idle = idle + 1 if work.done.total() == done else 0
        k = (k + 1) % len(RULES)
    # The first rule that has something to say about a node does.
    work.reasons = {node: reason for found in reversed(reasons) for node, reason in found.items()}
    g.remove_dead(work.graph, start=[])
    return work.done.total() > before


def _left(work: Work) -> list[Skip]:
    """What a user would ask about: every candidate that stayed, with the reason."""
    skips = []
    for node in work.nodes():
        reason = work.reasons.get(node)
        if reason is None and g.is_op(node, "BatchNormalization"):
            reason = _why_batchnorm_stays(node)
        if reason is not None:
            skips.append(Skip(node.name or node.outputs[0].name or node.op_type, f"{node.op_type}: {reason}"))
    return skips


def _why_batchnorm_stays(node: ir.Node) -> str:
    if g.attribute(node, "training_mode", 0):
        return "it is in training mode: its statistics come from the batch"
    if not all(g.is_constant(v) for v in node.inputs[1:]):
        return "its scale or statistics are computed at run time"
    x = node.inputs[0]
    producer = x.producer() if x is not None else None
    if producer is not None and g.is_op(producer, *HEAVY):
        if x is not None and g.only_user(x) is None:
            return f"the result of {producer.op_type} before it is read by other nodes too"
        return f"the weight of {producer.op_type} before it is computed at run time"
    before = producer.op_type if producer is not None else "an input"
    return f"it stands between {before} and operators that cannot take it over"
