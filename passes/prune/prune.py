"""Structured pruning of channels without retraining."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim import coupling, runtime
from onnxslim.channels import Labels
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.coupling import Coupling, Family, Site
from onnxslim.data import Data
from onnxslim.errors import CheckError
from onnxslim.graph import set_constant
from onnxslim.passes.prune import allocate, importance, measure
from onnxslim.passes.prune.layers import Layer, layer
from onnxslim.passes.prune.reconstruct import refit

TRIALS = 8  # plans tried without refitting
ATTEMPTS = 3  # plans, each more careful, before "nothing is nearly free"
PROBES = 16  # samples on which each family's meaning for the outputs is measured
FELT = 1e-4  # relative error of the readers that is more than rounding
MOST = 0.6  # share of a family that can leave when only what is nearly free may
ORACLE = 1e-3  # relative difference allowed between the masked and the pruned model at run time (float32 rounding)


@dataclasses.dataclass(frozen=True)
class Prune(Pass):
    """Removes whole channels, attention heads and hidden units, so that weights and activations get smaller.

    Which slices must leave together is derived from the graph (see onnxslim.coupling). Which of them matter least is
    judged on the calibration data by Optimal Brain Surgeon: the error that is left in the outputs of the layers that
    read a channel, once their other inputs have taken over what they can. The layers that are left are then refitted
    by least squares, in the order of the graph, to give the outputs of the original model again. No labels, no
    gradients.

    Without ``ratio`` only what is nearly free leaves: the relative squared error of the model's outputs, measured on
    calibration samples that the fit has not seen, stays below ``tolerance``. Layer normalization axes, model inputs
    and outputs, and whatever passes an operator without a rule stay as they are; the report names them.

    Options:
        ratio: remove as many parameters as cutting this fraction of all channels would (0 to 1), where it costs least.
        tolerance: relative squared error of the outputs that is nearly free, when no ratio is given.
        protect: regular expressions; families whose name or weights match stay whole.
        refit: refit the remaining weights (switch off only to see what it brings).
    """

    name: ClassVar[str] = "prune"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    needs_data: ClassVar[bool] = True

    ratio: float | None = None
    tolerance: float = 1e-2
    protect: tuple[str, ...] = ()
    refit: bool = True

    def __post_init__(self) -> None:
        self.require(self.ratio is None or 0 <= self.ratio < 1, f"ratio={self.ratio} must be at least 0 and below 1")
        self.require(self.tolerance >= 0, f"tolerance={self.tolerance} must not be negative")
        for pattern in self.protect:
            try:
                re.compile(pattern)
            except re.error as error:
                self.require(False, f"protect={pattern!r} is not a regular expression: {error}")

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        """Remove channels from ``model`` in place."""
        coupled = coupling.analyze(model, ctx.calibration.feed(ctx.calibration[0]), threads=ctx.threads)
        outcome = Outcome(skipped=[Skip(name, why) for name, why in coupled.frozen().items()])
        families = self._candidates(coupled, outcome)
        outcome.stats["families"] = len(families)
        if not families:
            return outcome
        if ctx.synthetic and self.ratio is None:
            outcome.skipped.append(Skip("*", "no calibration data: what is nearly free cannot be known; give a ratio"))
            return outcome
        fit, held_out = ctx.calibration.split(0.15)
        judge = dataclasses.replace(ctx, calibration=fit)
        measured = measure.factors(coupled, families, judge)
        orders, candidates = self._judge(coupled, families, measured, held_out, judge)

        def plan(tolerance: float) -> tuple[list[int], np.ndarray]:
            if self.ratio is None:
                counts = allocate.within(candidates, tolerance)
            else:
                counts = allocate.at_ratio(candidates, self.ratio)
            leaving = [f.atoms[o.units[:m]] for f, o, m in zip(families, orders, counts, strict=True)]
            return counts, np.concatenate([np.empty(0, np.int64), *leaving])

        allowed = self.tolerance
        for attempt in range(ATTEMPTS):
            counts, atoms = plan(np.inf)
            if self.ratio is None:
                # The sum of what the families cost alone is only an estimate: try plans before refitting one.
                low, high = 0.0, 8 * self.tolerance
                for trial in range(TRIALS):
                    middle = high / 8 if trial == 0 else (low + high) / 2
                    tried = measure.sensitivity(coupled, measured, [plan(middle)[1]], held_out.spread(PROBES), ctx)[0]
                    low, high = (middle, high) if tried <= allowed else (low, middle)
                counts, atoms = plan(low)
            outcome.stats["plans"] = attempt + 1
            if not len(atoms):
                break
            masked, error = self._refitted(model, coupled, atoms, fit, held_out, ctx, outcome)
            if self.ratio is not None or error <= self.tolerance:
                break
            allowed *= min(0.5, 0.7 * self.tolerance / error)
        else:
            outcome.skipped.append(Skip("*", f"nothing is nearly free: even the least cost an error of {error:.3g}"))
            return outcome
        for family, m in zip(families, counts, strict=True):
            if not m:
                why = f"one step of its {len(family.atoms)} channels costs more than elsewhere"
                outcome.skipped.append(Skip(family.name, why))
        outcome.stats.update(
            units=sum(len(f.atoms) for f in families),
            removed=int(sum(counts)),
            widths={f.name: [len(f.atoms), len(f.atoms) - m] for f, m in zip(families, counts, strict=True) if m},
        )
        if len(atoms):
            _copy_weights(masked, model)
            coupled.remove(atoms)
            _check_oracle(masked, model, ctx)
        return outcome

    def _candidates(self, coupled: Coupling, outcome: Outcome) -> list[Family]:
        """Families that may shrink; those that the user protects are skipped."""
        families = []
        for family in coupled.families:
            names = [family.name, *(v.name or "" for v, _ in family.weights)]
            if any(re.search(p, n) for p in self.protect for n in names):
                outcome.skipped.append(Skip(family.name, "protected"))
            else:
                families.append(family)
        return families

    def _judge(
        self,
        coupled: Coupling,
        families: list[Family],
        measured: Mapping[Site, measure.Factor],
        held_out: Data,
        ctx: Context,
    ) -> tuple[list[importance.Order], list[allocate.Candidate]]:
        """The order of removal in each family, and what each step costs in error of the model's outputs."""
        orders, probes = [], []
        for family in ctx.progress.track(families, total=len(families), label="rank channels"):
            count = len(family.atoms)
            most = MOST if self.ratio is None else min(1.0, 2 * self.ratio)
            limit = min(count - 1, int(np.ceil(most * count)))
            found = importance.order(measure.contributions(coupled, family, measured), count, limit=limit)
            orders.append(found)
            # Half of what may leave, or more where that still costs nothing: a ratio of two zeros says nothing.
            felt = int(np.searchsorted(found.error, FELT)) + 1
            probes.append(family.atoms[found.units[: max(1, len(found.units) // 2, felt)]])
        errors = measure.sensitivity(coupled, measured, probes, held_out.spread(PROBES), ctx)
        saved = [measure.savings(coupled, family) for family in families]
        totals = [max(sum(s[k] for s in saved), 1e-30) for k in (0, 1)]
        candidates = []
        for family, found, probe, error, save in zip(families, orders, probes, errors, saved, strict=True):
            local = found.error[len(probe) - 1] if len(found.error) else 0.0
            scale = error / max(local, FELT)
            width = measure.channels(coupled, family)
            gain = save[0] if self.ratio is not None else save[0] / totals[0] + save[1] / totals[1]
            step = allocate.step_of(width, len(family.atoms))
            candidates.append(allocate.Candidate(len(family.atoms), found.error * scale, gain, step))
        return orders, candidates

    def _refitted(
        self,
        model: ir.Model,
        coupled: Coupling,
        atoms: np.ndarray,
        fit: Data,
        held_out: Data,
        ctx: Context,
        outcome: Outcome,
    ) -> tuple[ir.Model, float]:
        """The masked model, refitted where that helps on samples the fit has not seen, and its error on those."""
        gone = coupled.removed(atoms)
        layers = [found for site in coupled.sites if (found := layer(site)) is not None]
        masked = model.clone()
        coupling.mask(masked, coupled.sites, gone)
        before = _error(model, masked, held_out, ctx)
        outcome.stats["error_masked"] = before
        if not self.refit or ctx.synthetic or not layers:
            return masked, before
        refitted = masked.clone()
        moved = _moved(model, coupled, layers, gone)
        count = refit(model, refitted, moved, lambda item: gone(item.site.labels), fit, held_out, ctx)
        after = _error(model, refitted, held_out, ctx)
        outcome.stats.update(error_refitted=after, refitted=count)
        if after < before:
            return refitted, after
        outcome.skipped.append(Skip("*", f"refitting was dropped: error {after:.3g} instead of {before:.3g}"))
        return masked, before


def _moved(
    model: ir.Model, coupled: Coupling, layers: list[Layer], gone: Callable[[Labels], np.ndarray]
) -> list[Layer]:
    """Layers whose input is changed by the removal, in the order of the graph."""
    changed: set[ir.Value] = set()
    felt = {site.node for site in coupled.sites if gone(site.labels).any()}
    by_node = {item.site.node: item for item in layers}
    result = []
    for node in model.graph:
        if node in felt or any(v in changed for v in node.inputs if v is not None):
            changed.update(node.outputs)
            if node in by_node:
                result.append(by_node[node])
    return result


def _copy_weights(source: ir.Model, target: ir.Model) -> None:
    """Give ``target`` the weights of ``source``, and the biases that were added to it."""
    for name, value in source.graph.initializers.items():
        array = value.const_value
        own = target.graph.initializers.get(name)
        if own is not None and array is not own.const_value and array is not None:
            set_constant(own, array.numpy())
    nodes = {node.outputs[0].name: node for node in target.graph}
    for node in source.graph:
        own_node = nodes.get(node.outputs[0].name)
        if own_node is None or node.op_type not in ("Conv", "Gemm") or len(own_node.inputs) >= len(node.inputs):
            continue
        bias = node.inputs[2]
        assert bias is not None
        own_node.resize_inputs(3)
        value = ir.Value(name=bias.name, const_value=bias.const_value, shape=bias.shape, type=bias.type)
        target.graph.register_initializer(value)
        own_node.replace_input_with(2, value)


def _error(original: ir.Model, candidate: ir.Model, data: Data, ctx: Context) -> float:
    """Relative squared error of the outputs, mean over samples."""
    runners = [runtime.load(m, threads=ctx.threads) for m in (original, candidate)]
    return float(np.mean([measure.output_error(*(runtime.run(r, feed) for r in runners)) for feed in data.feeds()]))


def _check_oracle(masked: ir.Model, pruned: ir.Model, ctx: Context) -> None:
    """Raise `CheckError` unless the masked and the pruned model agree on a few samples."""
    runners: list[Any] = [runtime.load(m, threads=ctx.threads) for m in (masked, pruned)]
    for feed in ctx.calibration.spread(2).feeds():
        expected, got = (runtime.run(r, feed) for r in runners)
        for name, array in expected.items():
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or not array.size:
                continue
            if array.shape != got[name].shape:
                raise CheckError(f"prune: output {name} has shape {got[name].shape} instead of {array.shape}")
            limit = ORACLE * float(np.abs(array).max()) + 1e-6
            worst = float(np.abs(array.astype(np.float64) - got[name]).max())
            if not worst <= limit:
                raise CheckError(f"prune: output {name} differs by {worst:.3g} from the masked model's")
