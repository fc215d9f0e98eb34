"""cluster: weights that share a few values."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.errors import ModelError
from onnxslim.opset import raise_opset
from onnxslim.palettes import shared
from onnxslim.restoring import parts
from onnxslim.units import name_all_nodes
from onnxslim.weights import Weight, borne, find_weights, with_moments

OPSET, IR_VERSION = 21, 10  # of integers with four bits


@dataclasses.dataclass(frozen=True)
class Cluster(Pass):
    """Lets the numbers of each weight share a few values, and stores which one each takes: a quarter of the bytes.

    The values are the means of clusters of the numbers (k-means), as many as the bits can tell apart. With calibration
    data numbers count by what they multiply, and each takes the value that disturbs the result least. The file holds
    indices of 8 bits, or of 4 for up to 4 bits (opset 21, to which the model is raised), and a Gather that looks them
    up; ONNX Runtime computes it once, when it loads the model, which then takes as much memory and time as before. What
    is smaller is the file. Weights of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN, and the tables of Gather.

    Options:
        bits: 1 to 8; a weight has 2 to the power of this many values.
        palette: store indices. Without it the float32 weights are written: no smaller as a file, but the report says
            what deflate (zip, gzip, the packages of app stores) makes of it; for runtimes that do not fold constants.
        fidelity: share of the variance of each output that must survive, measured on held-out samples (on all where
            there are fewer than 44): 1 minus squared error over variance, less its standard error. Layers stay as they
            are until it holds, the most harmful ones first; 0 turns that off, and without calibration data it is not
            measured.
        keep: names of layers (nodes) that stay as they are.
        samples: how many calibration samples are used at most.
    """

    name: ClassVar[str] = "cluster"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    last: ClassVar[bool] = True

    bits: int = 8
    palette: bool = True
    fidelity: float = 0.98
    keep: tuple[str, ...] = ()
    samples: int = 32

    def __post_init__(self) -> None:
        self.require(1 <= self.bits <= 8, f"bits={self.bits} must be between 1 and 8")
        self.require(0 <= self.fidelity < 1, f"fidelity={self.fidelity} must be at least 0 and below 1")
        self.require(self.samples >= 1, f"samples={self.samples} must be at least 1")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        name_all_nodes(model)
        weights, skipped = find_weights(model, self.keep, tables=True)
        if not weights:
            return Outcome({"weights": 0}, skipped)
        stats: dict[str, Any] = {"weights": len(weights), "bits": self.bits, "rounded": 0}
        before = model_io.deflated(model)
        judged = self.fidelity > 0 and not ctx.synthetic and len(ctx.calibration) > 0
        fit, held_out = parts(ctx.calibration) if judged else (ctx.calibration, ctx.calibration)
        made: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for group in with_moments(model, weights, dataclasses.replace(ctx, calibration=fit), self.samples):
            for weight, moments in ctx.progress.track(group, total=len(group), label="cluster"):
                stats["rounded"] += moments is not None
                array = g.constant(weight.value)
                assert array is not None
                made[weight.value.name or ""] = shared(weight, array, 2**self.bits, moments)
        if judged:
            changed = {name: values[index] for name, (values, index) in made.items()}
            kept = borne(model, changed, weights, held_out, self.fidelity, ctx)
            del changed
            weights = kept.weights
            skipped += kept.skipped
            stats |= {"weights": len(weights), "fidelity": kept.fidelity}
        width = 8
        if self.palette and weights and self.bits <= 4 and raise_opset(model, OPSET) is None:
            model.ir_version, width = max(model.ir_version, IR_VERSION), 4
        written: dict[str, Weight] = {}
        for weight in weights:
            values, index = made[weight.value.name or ""]
            if self.palette:
                written[_write(model, weight, values, index, width)] = weight
            else:
                g.set_constant(weight.value, values[index])
        g.remove_dead(model.graph)
        if self.palette:
            with contextlib.suppress(ModelError):  # an operator that this runtime does not know: it cannot be seen
                stats["looked_up_at_run_time"] = self._left(model, written, ctx, skipped)
        return Outcome(stats | {"deflated_bytes_before": before, "deflated_bytes": model_io.deflated(model)}, skipped)

    def _left(self, model: ir.Model, written: dict[str, Weight], ctx: Context, skipped: list[Skip]) -> int:
        """How many weights ONNX Runtime would look up at every inference; a warning where it does."""
        executed = runtime.optimized(model, threads=ctx.threads)
        names = {runtime.original_name(node.name or "") for node in executed.graph.all_nodes()}
        left = [weight.name for name, weight in written.items() if name in names]
        if left:
            ctx.warnings.append(
                f"cluster: ONNX Runtime looks up {len(left)} weights at every inference (first: {left[0]}), which is "
                "slower; cluster(palette=false) stores them as they are"
            )
        return len(left)


def _write(model: ir.Model, weight: Weight, values: np.ndarray, index: np.ndarray, width: int) -> str:
    """Let the readers of ``weight`` read a Gather of ``values``; its name."""
    name = weight.value.name or ""
    stored = g.add_integers(model.graph, f"{name}_index", index, width)
    table = g.add_constant(model.graph, f"{name}_values", values)
    before = model.graph[0]
    cast = g.add_node(
        model.graph, "Cast", [stored], before=before, attributes={"to": int(ir.DataType.INT32)}, hint=f"{name}_index"
    )
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.INT32, stored.shape
    gather = g.add_node(model.graph, "Gather", [table, cast.outputs[0]], before=before, hint=name, like=weight.value)
    weight.value.replace_all_uses_with(gather.outputs[0])
    return gather.name or ""
