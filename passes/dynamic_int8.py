"""dynamic_int8: integer products without calibration data."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim import cost, dynamic, runtime
from onnxslim.choice import fastest, slower_layer
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.data import Data
from onnxslim.graph import is_op
from onnxslim.opset import raise_opset
from onnxslim.restoring import Judge, keep
from onnxslim.results import Told
from onnxslim.saturation import saturates_here
from onnxslim.units import NEVER, PRODUCTS, name_all_nodes

# The result must be faster than the float model by this factor, which is wider than the noise of timing.
FASTER = 1.02
TIMED = 4


@dataclasses.dataclass(frozen=True)
class DynamicInt8(Pass):
    """Runs MatMul, Gemm and LSTM on 8-bit integers with the ranges that their inputs have at every inference.

    No calibration data is needed, and no input falls outside the range; quantizing inputs anew each time costs more
    than static ranges do (see int8). Layers go back to float until the outputs keep the fidelity asked for and wherever
    they are measured slower. When nothing is faster, as with small layers and single rows, the model stays as it is.

    Options:
        fidelity: share of the variance of each output that must survive: 1 minus squared error over variance, on some
            samples. 0 turns the check off.
        measure: time the candidates and keep only what is faster. Without it, every layer that can be int8 is.
        keep: names of layers (nodes) that stay in float.
        portable: also right on x86 CPUs without VNNI, whose kernels add two products in 16 bits: weights are kept so
            small that the sums fit. None: where the kernels of this machine do that.
    """

    name: ClassVar[str] = "dynamic_int8"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    last: ClassVar[bool] = True

    fidelity: float = 0.98
    measure: bool = True
    keep: tuple[str, ...] = ()
    portable: bool | None = None

    def __post_init__(self) -> None:
        self.require(0 <= self.fidelity < 1, f"fidelity={self.fidelity} must be at least 0 and below 1")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        draft = model.clone()
        name_all_nodes(draft)
        reasons: dict[str, str] = {}
        suited: list[str] = []
        for node in draft.graph.all_nodes():
            if not is_op(node, *PRODUCTS, *NEVER):
                continue
            reason = "asked to stay in float" if node.name in self.keep else dynamic.unsuitable(node)
            if reason is None:
                suited.append(node.name or "")
            else:
                reasons[node.name or ""] = reason
        layers = len(suited) + len(reasons)
        problem = raise_opset(draft, 13) if suited else None
        if problem is None and ctx.target == "cuda":
            problem = "ONNX Runtime's CUDA provider has no dynamic integer kernels"
        if problem is None and self.measure and not len(ctx.calibration):
            problem = "nothing to measure it with: the model does not run on generated inputs; give --calib"
        portable = saturates_here() if self.portable is None else self.portable
        if problem is not None:
            reasons.update(dict.fromkeys(suited, problem))
            suited = []
        found = search(draft, suited, ctx.calibration, ctx, self.fidelity, measure=self.measure, portable=portable)
        reasons |= found.reasons
        if found.names:
            dynamic.insert(draft, found.names, portable=portable)
            model.graph = draft.graph
            model.ir_version = draft.ir_version
        stats: dict[str, Any] = {"layers": layers, "int8_layers": len(found.names), "portable": portable}
        figures = {"fidelity": found.fidelity, "speedup": found.speeds}
        stats |= {name: figure for name, figure in figures.items() if figure}
        return Outcome(stats, [Skip(name, reason) for name, reason in reasons.items()])


@dataclasses.dataclass
class Found:
    """Which layers are worth it.

    Attributes:
        names: of the layers, in the order of the graph.
        reasons: why each of the others is not.
        fidelity: of the outputs; None where it was not judged.
        speeds: over the model as it was, of each candidate that was timed.
    """

    names: list[str]
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    fidelity: float | None = None
    speeds: dict[str, float] = dataclasses.field(default_factory=dict)


def search(
    model: ir.Model,
    names: Sequence[str],
    data: Data,
    ctx: Context,
    fidelity: float,
    *,
    measure: bool,
    portable: bool,
) -> Found:
    """Find those of ``names`` that keep ``fidelity`` on integers (0 is no bound), and with ``measure`` are faster.

    Args:
        model: it is not changed; its nodes have names of their own.
        data: samples that judge; nothing is learned from them.
        portable: see `DynamicInt8`.
    """
    trial = _Trial(model, data, ctx, portable, Found(list(names)))
    found = trial.found
    if found.names and fidelity and len(data):
        trial.faithful(1 - fidelity)
    if found.names and measure:
        trial.faster()
    return found


@dataclasses.dataclass
class _Trial:
    model: ir.Model
    data: Data
    ctx: Context
    portable: bool
    found: Found

    def faster(self) -> None:
        """Leave out what does not make the model faster."""
        found, chosen = self.found, self.found.names
        feeds = list(self.data.spread(TIMED).feeds())
        models = {"all": self.insert(chosen)}
        float_times, times = (runtime.profile(m, feeds, threads=self.ctx.threads) for m in (self.model, models["all"]))
        outputs = {node.name: [v.name or "" for v in node.outputs] for node in self.model.graph.all_nodes()}
        losing: dict[str, str] = {}
        for name in chosen:
            reason = slower_layer(*(_spent(name, outputs[name], t) for t in (float_times, times)))
            if reason is not None:
                losing[name] = reason
        kept = [n for n in chosen if n not in losing]
        if losing and kept:
            models["restored"] = self.insert(kept)
        choice = fastest(self.model, models, feeds, self.ctx, least=FASTER)
        found.speeds = {name: round(speed, 3) for name, speed in choice.speeds.items()}
        if choice.name is None:
            found.names = []
            found.reasons.update(dict.fromkeys(chosen, choice.refusal))
        elif choice.name != "all":
            found.names = kept
            found.reasons.update(losing)

    def insert(self, names: Collection[str]) -> ir.Model:
        """A copy of the model with ``names`` on integers."""
        clone = self.model.clone()
        dynamic.insert(clone, names, portable=self.portable)
        return clone

    def faithful(self, budget: float) -> None:
        """Leave out as much as the outputs cannot bear, the layers that disturb them most first."""
        told = Told(self.model, self.ctx.threads)

        @functools.lru_cache(maxsize=1)  # samples are judged one after the other with the same layers
        def runner(names: frozenset[str]) -> runtime.Runner:
            return runtime.load(told.of(self.insert(names)), threads=self.ctx.threads)

        def run(feed: dict[str, np.ndarray], names: Collection[str]) -> list[np.ndarray]:
            return runtime.arrays(runtime.run(runner(frozenset(names)), feed))

        macs = cost.analyze(self.model, self.data.feed(self.data[0])).macs
        judge = Judge(run, self.data, macs, self.ctx, budget, told.exact)
        kept = keep(self.found.names, budget, judge.noise, judge.rank)
        self.found.names, self.found.fidelity = kept.names, round(1 - kept.noise, 5)
        for name, alone in kept.restored.items():
            self.found.reasons[name] = f"on integers it alone takes {alone:.2%} of an output's variance"


def _spent(name: str, outputs: Sequence[str], times: Mapping[str, float]) -> float:
    """Milliseconds of a layer, whatever ONNX Runtime calls it."""
    return sum(times.get(n, 0.0) for n in {name, f"{name}/MatMulAddFusion", *outputs})
