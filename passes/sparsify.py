"""sparsify: zeros among the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim import graph as g
from onnxslim import model as model_io
from onnxslim import runtime
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.data import Data
from onnxslim.noise import share
from onnxslim.restoring import JUDGED, parts
from onnxslim.results import Told
from onnxslim.sparsity import Costs, Layer, Pattern
from onnxslim.units import name_all_nodes
from onnxslim.weights import Weight, borne, find_weights, with_moments

# Shares that are tried.
SHARES = tuple(k / 20 for k in range(1, 20))


@dataclasses.dataclass(frozen=True)
class Sparsify(Pass):
    """Sets weights to zero, the least important of all layers first; the file is smaller once it is compressed.

    ONNX stores zeros like any number and ONNX Runtime multiplies with them: the model is neither faster nor its file
    smaller by itself. The report says what the file is before and after deflate (zip, gzip, the packages of app
    stores). Runtimes with sparse kernels can gain more: 2:4 is the pattern of NVIDIA's sparse tensor cores (TensorRT).

    With calibration data the importance of a weight is the error of its layer's result without it, and the weights that
    stay are refitted by least squares to what the layer reads (optimal brain surgeon). Without, the smallest weights
    go, and a ratio or pattern must be given. Weights of Conv, ConvTranspose, Gemm, MatMul, LSTM, GRU and RNN.

    Options:
        ratio: share of these weights that is set to zero, spread over the layers by what it costs there. Without it and
            without a pattern: as many as keep the fidelity asked for.
        pattern: "2:4" leaves at most two of every four consecutive inputs of each output; any N:M with N below M.
        fidelity: share of the variance of each output that must survive, measured on held-out samples (on all where
            there are fewer than 44): 1 minus squared error over variance, less its standard error. With a ratio or
            pattern, layers stay as they are until it holds, the most harmful ones first; 0 turns that off, and without
            calibration data it is not measured.
        keep: names of layers (nodes) that stay as they are.
        samples: how many calibration samples are used at most.
    """

    name: ClassVar[str] = "sparsify"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")

    ratio: float | None = None
    pattern: str | None = None
    fidelity: float = 0.98
    keep: tuple[str, ...] = ()
    samples: int = 128

    def __post_init__(self) -> None:
        self.require(self.ratio is None or 0 < self.ratio < 1, f"ratio={self.ratio} must be between 0 and 1")
        self.require(
            self.pattern is None or Pattern.parse(self.pattern) is not None,
            f'pattern={self.pattern!r} must be N:M with 0 < N < M, as "2:4"',
        )
        self.require(self.ratio is None or self.pattern is None, "give ratio or pattern, not both")
        self.require(0 <= self.fidelity < 1, f"fidelity={self.fidelity} must be at least 0 and below 1")
        asked = self.ratio is not None or self.pattern is not None
        self.require(asked or self.fidelity > 0, "without ratio or pattern, fidelity says how many zeros there may be")
        self.require(self.samples >= 1, f"samples={self.samples} must be at least 1")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        name_all_nodes(model)
        weights, skipped = find_weights(model, self.keep)
        pattern = Pattern.parse(self.pattern) if self.pattern is not None else None
        if pattern is not None:
            weights, odd = _fitting(weights, pattern)
            skipped += odd
        blind = ctx.synthetic or not len(ctx.calibration)
        if blind and self.ratio is None and pattern is None:
            why = "no calibration data: how many zeros the outputs bear is not known; give ratio, pattern or --calib"
            skipped += [Skip(weight.name, why) for weight in weights]
            weights = []
        stats: dict[str, Any] = {"layers": len(weights) + len(skipped), "sparse_layers": len(weights)}
        if not weights:
            return Outcome(stats, skipped)
        fit, held_out = (ctx.calibration, ctx.calibration) if blind else parts(ctx.calibration)
        work = _Work(model, weights, dataclasses.replace(ctx, calibration=fit), self.samples)
        if pattern is not None:
            found: Iterable[tuple[ir.Value, np.ndarray]] = work.patterned(pattern)
        elif self.ratio is not None:
            found = work.thinned(self.ratio)
        else:
            found, stats["fidelity"] = self._search(model, work, held_out, ctx)
        before = model_io.deflated(model)
        if not blind and self.fidelity and "fidelity" not in stats:
            arrays = {value.name or "": array for value, array in found}
            kept = borne(model, arrays, weights, held_out, self.fidelity, ctx)
            found = [(weight.value, arrays[weight.value.name or ""]) for weight in kept.weights]
            skipped += kept.skipped
            stats |= {"sparse_layers": len(kept.weights), "fidelity": kept.fidelity}
        for value, array in found:
            g.set_constant(value, array)
        return Outcome(stats | _figures(model, weights, before, work, ctx), skipped)

    def _search(
        self, model: ir.Model, work: _Work, held_out: Data, ctx: Context
    ) -> tuple[Iterable[tuple[ir.Value, np.ndarray]], float]:
        """The largest of `SHARES` that keeps the fidelity, by bisection, and the fidelity it has."""
        feeds = list(held_out.spread(JUDGED).feeds())
        told = Told(model, ctx.threads)
        runner = runtime.load(told.model, threads=ctx.threads)
        exact = [told.exact(f, runtime.arrays(runner(f))) for f in feeds]
        best: tuple[list[tuple[ir.Value, np.ndarray]], float] = ([], 1.0)
        low, high = 0, len(SHARES)  # the number of shares that can be had lies in [low, high]
        while low < high:
            middle = (low + high + 1) // 2
            found = list(work.thinned(SHARES[middle - 1]))
            other = runtime.load(_with(told.model, found), threads=ctx.threads)
            lost = share([e.gaps(runtime.arrays(other(f))) for e, f in zip(exact, feeds, strict=True)])
            if lost <= 1 - self.fidelity:
                low, best = middle, (found, round(1 - lost, 5))
            else:
                high = middle - 1
        return best


class _Work:
    """Makes weights sparse, a group of layers at a time; what a single group reads is collected once."""

    def __init__(self, model: ir.Model, weights: Sequence[Weight], ctx: Context, samples: int) -> None:
        self.model = model
        self.weights = weights
        self.ctx = ctx
        self.samples = samples
        self.solved = 0
        self._only: list[list[tuple[Weight, np.ndarray | None]]] = []

    def thinned(self, ratio: float) -> Iterator[tuple[ir.Value, np.ndarray]]:
        """Every weight with its share of zeros, ``ratio`` of all of them together."""
        costs = Costs()
        for layer in self._layers():
            costs.add(layer.costs(layer.rows))
        limit = costs.limit(ratio)
        return self._made(lambda layer: layer.thinned(layer.share(limit)))

    def patterned(self, pattern: Pattern) -> Iterator[tuple[ir.Value, np.ndarray]]:
        """Every weight in the pattern."""
        return self._made(lambda layer: layer.thinned(pattern))

    def _made(self, make: Callable[[Layer], np.ndarray]) -> Iterator[tuple[ir.Value, np.ndarray]]:
        self.solved = 0
        for layer in self.ctx.progress.track(self._layers(), total=len(self.weights), label="sparsify"):
            self.solved += layer.solves
            yield layer.weight.value, make(layer)

    def _layers(self) -> Iterator[Layer]:
        groups = with_moments(self.model, self.weights, self.ctx, self.samples)
        for group in self._only or groups:
            if len(group) == len(self.weights):
                self._only = [group]
            for weight, moments in group:
                array = g.constant(weight.value)
                assert array is not None
                yield Layer(weight, array, moments)


def _fitting(weights: Sequence[Weight], pattern: Pattern) -> tuple[list[Weight], list[Skip]]:
    """The weights that the pattern divides, and the others."""
    fitting, odd = [], []
    for weight in weights:
        assert weight.value.const_value is not None
        inputs = int(weight.value.const_value.shape.numpy()[weight.axis])
        if inputs % pattern.of:
            odd.append(Skip(weight.name, f"its {inputs} inputs are no multiple of {pattern.of}"))
        else:
            fitting.append(weight)
    return fitting, odd


def _with(model: ir.Model, found: Iterable[tuple[ir.Value, np.ndarray]]) -> ir.Model:
    clone = model.clone()
    for value, array in found:
        g.set_constant(clone.graph.initializers[value.name or ""], array)
    return clone


def _figures(model: ir.Model, weights: Sequence[Weight], before: int, work: _Work, ctx: Context) -> dict[str, Any]:
    """What was done, and a warning of what it is not."""
    arrays = [array for weight in weights if (array := g.constant(weight.value)) is not None]
    zeros = sum(int((array == 0).sum()) for array in arrays)
    after = model_io.deflated(model)
    ctx.warnings.append(
        "sparsify: ONNX Runtime is no faster with zeros, and the file no smaller until it is compressed: deflate makes "
        f"{after:,} bytes of it, and {before:,} of the file before"
    )
    return {
        "zeros": round(zeros / max(sum(a.size for a in arrays), 1), 4),
        "refitted": work.solved,
        "deflated_bytes_before": before,
        "deflated_bytes": after,
    }
