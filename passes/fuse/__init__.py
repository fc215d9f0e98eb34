"""fuse: arithmetic that amounts to an operator, as that operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import onnx_ir as ir

from onnxslim import graph as g
from onnxslim import inference
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.opset import NEWEST, raise_opset
from onnxslim.passes.fold import OLDEST_OPSET, Fold
from onnxslim.passes.fuse.functions import fuse_functions
from onnxslim.passes.fuse.norms import fuse_norms
from onnxslim.passes.fuse.parallel import merge_parallel
from onnxslim.passes.fuse.rows import drop_batch_axis
from onnxslim.passes.fuse.shifts import fuse_shifts
from onnxslim.passes.fuse.sums import merge_sums
from onnxslim.passes.fuse.work import Work
from onnxslim.passes.simplify import Simplify
from onnxslim.sharing import deduplicate_initializers

RULES: Sequence[Callable[[Work], None]] = (fuse_norms, fuse_functions)
# Operators that ONNX Runtime's CPU provider runs slower from this version of the operator set on (by half and more).
SLOWER = (("AveragePool", 19),)


@dataclasses.dataclass(frozen=True)
class Fuse(Pass):
    """Puts arithmetic that amounts to an operator back together: fewer nodes, and kernels that ONNX Runtime fuses.

    * Elementwise nodes around scalar constants: Gelu (erf and tanh), HardSwish, HardSigmoid, Softplus, Mish,
      LeakyRelu, Sigmoid, Tanh, Relu, Clip, whatever the order and the number of the nodes. Interval arithmetic proves
      that the two agree for every number; a constant factor that is left over goes into the weights behind.
    * Means and roots over the last axes: LayerNormalization, RMSNormalization, InstanceNormalization, with or without
      scale and bias. Two algebraic functions that are equal at random points, tiny and huge ones, are equal.
    * Mul and Add per channel between convolutions: BatchNormalization, which ONNX Runtime's CPU provider runs on the
      blocks of channels of the convolutions, where they would be copied out and back. Done when the graph that the
      runtime executes here has fewer nodes then.
    * Products of one value with several constant matrices (queries, keys and values): one product, split behind it.
    * Products with a bias in a file for one sample: without the axis of size 1 they are Gemm of matrices. Done where
      the pairs that become one node are more than the nodes that take the axis away and give it back.
    * Bias and residual in front of LayerNormalization: one Sum, which the CPU provider runs faster than the
      SkipLayerNormalization it would make of the Adds.

    Only operators of the standard are used. Left as they are: values in between that somebody else reads, and float64.
    What ONNX Runtime fuses further (Gelu with its bias, a product with its transposed operand) it still finds.

    Options:
        opset: the model may be raised up to this version of the operator set when that lets an operator be used
            (HardSwish 14, LayerNormalization 17, Mish 18, Gelu 20), and no further than its operators are as fast
            there; 0 leaves its version alone.
    """

    name: ClassVar[str] = "fuse"
    effect: ClassVar[Effect] = Effect.ROUNDING
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")

    opset: int = NEWEST

    def __post_init__(self) -> None:
        self.require(0 <= self.opset <= NEWEST, f"opset={self.opset} must be at most {NEWEST}")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        version = g.opset(model)
        if version < OLDEST_OPSET:
            return Outcome(skipped=[Skip("*", f"operator set {version} is older than {OLDEST_OPSET}")])
        skipped = []
        # Shape arithmetic that has become constant since the model was read tells ranks that were unknown then.
        draft = model.clone()
        inference.run(draft)
        reach = max(version, self._reach(draft))
        if reach > version:
            # What could be done with newer operators says which version it takes.
            trial = draft.clone()
            reason = raise_opset(trial, reach)
            if reason is not None:
                skipped.append(Skip("*", reason))
            else:
                needed = _fuse(trial, reach, None).needed
                if needed > version:
                    raise_opset(draft, needed)
        work = _fuse(draft, g.opset(draft), ctx)
        if work.done:
            # Fewer readers and larger products leave more for it to do.
            Simplify().apply(draft, ctx)
            model.graph = draft.graph
            model.ir_version = draft.ir_version
        return Outcome(dict(sorted(work.done.items())), skipped)

    def _reach(self, model: ir.Model) -> int:
        """The version of the operator set up to which ``model`` may be raised."""
        used = {node.op_type for node in model.graph.all_nodes()}
        slower = [since - 1 for op_type, since in SLOWER if op_type in used and g.opset(model) < since]
        return min([self.opset, *slower])


def _fuse(model: ir.Model, newest: int, ctx: Context | None) -> Work:
    """Apply every rule until none finds anything; without a context, leave out what takes no newer operators."""
    work = Work(model, newest)
    done = -1
    while work.done.total() != done:
        done = work.done.total()
        for rule in RULES:
            rule(work)
        if work.scaled and ctx is not None:
            Fold().apply(model, ctx)
            work.scaled = False
    if ctx is not None:
        merge_parallel(work)
        if work.done.total() != done:
            Fold().apply(model, ctx)  # one product in the place of several may follow another alone
        drop_batch_axis(work)
        merge_sums(work, ctx)
        fuse_shifts(work, ctx)
    g.remove_dead(model.graph, start=[])
    deduplicate_initializers(model)
    return work
