"""dynamic_int8: integer products without calibration data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim import dynamic, runtime
from onnxslim.choice import fastest, slower_layer
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.graph import is_op
from onnxslim.opset import raise_opset
from onnxslim.probe import noise
from onnxslim.restoring import keep
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
        chosen: list[str] = []
        for node in draft.graph.all_nodes():
            if not is_op(node, *PRODUCTS, *NEVER):
                continue
            reason = "asked to stay in float" if node.name in self.keep else dynamic.unsuitable(node)
            if reason is None:
                chosen.append(node.name or "")
            else:
                reasons[node.name or ""] = reason
        layers = len(chosen) + len(reasons)
        problem = raise_opset(draft, 13) if chosen else None
        if problem is None and ctx.target == "cuda":
            problem = "ONNX Runtime's CUDA provider has no dynamic integer kernels"
        feeds = list(ctx.calibration.spread(TIMED).feeds()) if len(ctx.calibration) else []
        if problem is None and self.measure and not feeds:
            problem = "nothing to measure it with: the model does not run on generated inputs; give --calib"
        if problem is not None:
            reasons.update(dict.fromkeys(chosen, problem))
            chosen = []
        portable = saturates_here() if self.portable is None else self.portable
        search = _Search(draft, feeds, ctx, reasons, portable)
        if chosen and self.fidelity and feeds:
            chosen = search.faithful(chosen, 1 - self.fidelity)
        if chosen and self.measure:
            chosen = search.faster(chosen)
        if chosen:
            dynamic.insert(draft, chosen, portable=portable)
            model.graph = draft.graph
        stats = {"layers": layers, "int8_layers": len(chosen), "portable": portable, **search.figures}
        return Outcome(stats, [Skip(name, reason) for name, reason in reasons.items()])


@dataclasses.dataclass
class _Search:
    """Which layers of ``model`` are worth having on integers; the others get their ``reasons``."""

    model: ir.Model
    feeds: Sequence[Mapping[str, np.ndarray]]
    ctx: Context
    reasons: dict[str, str]
    portable: bool
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)

    def faster(self, chosen: list[str]) -> list[str]:
        """Those of ``chosen`` that make the model faster."""
        models = {"all": self.insert(chosen)}
        float_times, times = (
            runtime.profile(m, self.feeds, threads=self.ctx.threads) for m in (self.model, models["all"])
        )
        outputs = {node.name: [v.name or "" for v in node.outputs] for node in self.model.graph.all_nodes()}
        losing: dict[str, str] = {}
        for name in chosen:
            reason = slower_layer(*(_spent(name, outputs[name], t) for t in (float_times, times)))
            if reason is not None:
                losing[name] = reason
        kept = [n for n in chosen if n not in losing]
        if losing and kept:
            models["restored"] = self.insert(kept)
        choice = fastest(self.model, models, self.feeds, self.ctx, least=FASTER)
        self.figures["speedup"] = {name: round(speed, 3) for name, speed in choice.speeds.items()}
        if choice.name is None:
            self.reasons.update(dict.fromkeys(chosen, choice.refusal))
            return []
        if choice.name == "all":
            return chosen
        self.reasons.update(losing)
        return kept

    def insert(self, names: Sequence[str]) -> ir.Model:
        """A copy of the model with ``names`` on integers."""
        clone = self.model.clone()
        dynamic.insert(clone, names, portable=self.portable)
        return clone

    def faithful(self, chosen: list[str], budget: float) -> list[str]:
        """As many of ``chosen`` as the outputs bear, the layers that disturb them most left out first."""
        runner = runtime.load(self.model, threads=self.ctx.threads)
        exact = [runtime.arrays(runner(f)) for f in self.feeds]

        def lost(names: Sequence[str]) -> float:
            if not names:
                return 0.0
            other = runtime.load(self.insert(names), threads=self.ctx.threads)
            return noise([(e, runtime.arrays(other(f))) for e, f in zip(exact, self.feeds, strict=True)])

        def alone(names: Sequence[str]) -> dict[str, float]:
            tracked = self.ctx.progress.track(names, total=len(names), label="sensitivity")
            return {name: lost([name]) for name in tracked}

        kept = keep(chosen, budget, lost, alone)
        self.figures["fidelity"] = round(1 - kept.noise, 5)
        for name, noise_alone in kept.restored.items():
            self.reasons[name] = f"on integers it alone takes {noise_alone:.2%} of an output's variance"
        return kept.names


def _spent(name: str, outputs: Sequence[str], times: Mapping[str, float]) -> float:
    """Milliseconds of a layer, whatever ONNX Runtime calls it."""
    return sum(times.get(n, 0.0) for n in {name, f"{name}/MatMulAddFusion", *outputs})
