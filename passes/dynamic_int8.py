"""dynamic_int8: integer products without calibration data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim import dynamic, runtime
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.graph import is_op
from onnxslim.opset import raise_opset
from onnxslim.probe import noise
from onnxslim.units import NEVER, PRODUCTS, name_all_nodes

# A layer goes back to float when that takes less than this share of its time on integers; the result must be faster
# than the float model by this factor. Both are wider than the noise of timing.
CLEAR, FASTER = 0.9, 1.02
SECONDS, TIMED = 3.0, 4


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
    """

    name: ClassVar[str] = "dynamic_int8"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    last: ClassVar[bool] = True

    fidelity: float = 0.98
    measure: bool = True
    keep: tuple[str, ...] = ()

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
        figures: dict[str, Any] = {}
        if problem is not None:
            reasons.update(dict.fromkeys(chosen, problem))
            chosen = []
        if chosen and self.fidelity and feeds:
            chosen = self._faithful(draft, chosen, feeds, reasons, figures, ctx)
        if chosen and self.measure:
            chosen = self._faster(draft, chosen, feeds, reasons, figures, ctx)
        if chosen:
            dynamic.insert(draft, chosen)
            model.graph = draft.graph
        stats = {"layers": layers, "int8_layers": len(chosen), **figures}
        return Outcome(stats, [Skip(name, reason) for name, reason in reasons.items()])

    def _faster(
        self,
        model: ir.Model,
        chosen: list[str],
        feeds: Sequence[Mapping[str, np.ndarray]],
        reasons: dict[str, str],
        figures: dict[str, Any],
        ctx: Context,
    ) -> list[str]:
        """Those of ``chosen`` worth having, adding the others to ``reasons``."""
        everything = _with(model, chosen)
        float_times, times = (runtime.profile(m, feeds, threads=ctx.threads) for m in (model, everything))
        outputs = {node.name: [v.name or "" for v in node.outputs] for node in model.graph.all_nodes()}
        losing: dict[str, str] = {}
        for name in chosen:
            then, now = (_spent(name, outputs[name], t) for t in (float_times, times))
            if 0 < then < now * CLEAR:
                losing[name] = f"slower on integers: {now:.3f} ms, {then:.3f} ms in float"
        candidates = {"all": chosen}
        if 0 < len(losing) < len(chosen):
            candidates["restored"] = [n for n in chosen if n not in losing]
        models = [everything, *(_with(model, names) for label, names in candidates.items() if label != "all")]
        runners = [runtime.load(m, threads=ctx.threads) for m in (model, *models)]
        timed = runtime.compare_latency(runners, [feeds] * len(runners), seconds=SECONDS, seed=ctx.seed)
        speeds = {n: timed.latency[0].p10 / timed.latency[k].p10 for k, n in enumerate(candidates, 1)}
        figures["speedup"] = {name: round(speed, 3) for name, speed in speeds.items()}
        best = max(speeds, key=lambda n: speeds[n])
        if speeds[best] < FASTER:
            reasons.update(dict.fromkeys(chosen, f"the model is not faster on integers ({speeds[best]:.2f}x at best)"))
            return []
        if best != "all":
            reasons.update(losing)
        return candidates[best]

    def _faithful(
        self,
        model: ir.Model,
        chosen: list[str],
        feeds: Sequence[Mapping[str, np.ndarray]],
        reasons: dict[str, str],
        figures: dict[str, Any],
        ctx: Context,
    ) -> list[str]:
        """As many of ``chosen`` as the outputs bear, the layers that disturb them most left out first."""
        runner = runtime.load(model, threads=ctx.threads)
        exact = [list(runner(f).values()) for f in feeds]

        def lost(names: Sequence[str]) -> float:
            other = runtime.load(_with(model, names), threads=ctx.threads)
            return noise([(e, list(other(f).values())) for e, f in zip(exact, feeds, strict=True)]) if names else 0.0

        budget = 1 - self.fidelity
        total = lost(chosen)
        figures["fidelity"] = round(1 - total, 5)
        if total <= budget:
            return chosen
        alone = {name: lost([name]) for name in ctx.progress.track(chosen, total=len(chosen), label="sensitivity")}
        order = sorted(chosen, key=lambda n: (-alone[n], n))
        low, high = 1, len(order)  # the number of layers to leave in float lies in [low, high]
        while low < high:
            middle = (low + high) // 2
            if lost(order[middle:]) <= budget:
                high = middle
            else:
                low = middle + 1
        gone = set(order[:high])
        reasons.update({n: f"on integers it alone takes {alone[n]:.2%} of an output's variance" for n in gone})
        kept = [n for n in chosen if n not in gone]
        figures["fidelity"] = round(1 - lost(kept), 5)
        return kept


def _with(model: ir.Model, names: Sequence[str]) -> ir.Model:
    clone = model.clone()
    dynamic.insert(clone, names)
    return clone


def _spent(name: str, outputs: Sequence[str], times: Mapping[str, float]) -> float:
    """Milliseconds of a layer, whatever ONNX Runtime calls it."""
    return sum(times.get(n, 0.0) for n in {name, f"{name}/MatMulAddFusion", *outputs})
