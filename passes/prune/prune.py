"""Structured pruning of channels without retraining."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxslim import coupling, kernel_steps
from onnxslim.channels import Labels
from onnxslim.contract import CAREFUL, Context, Effect, Outcome, Pass, Skip
from onnxslim.coupling import Coupling, Family, Site
from onnxslim.data import Data
from onnxslim.errors import CheckError, ModelError
from onnxslim.graph import by_output, captured, set_constant, walk
from onnxslim.passes.prune import allocate, measure, safety
from onnxslim.passes.prune import importance as surgeon
from onnxslim.passes.prune import lossless as free_channels
from onnxslim.passes.prune import record as plans
from onnxslim.passes.prune.layers import Layer, layer
from onnxslim.passes.prune.plan import Planner
from onnxslim.passes.prune.reconstruct import refit
from onnxslim.restoring import ALONE

TRIALS = 8  # plans tried without refitting
ATTEMPTS = 3  # plans, each more careful, before "nothing is nearly free"
PROBES = 16  # samples on which each family's meaning for the outputs is measured
LEVELS = (0.35, 1.0)  # parts of what may leave a family at which that is measured
FELT = 1e-4  # relative error of the readers that is more than rounding
MOST = 0.6  # share of a family that can leave when only what is nearly free may
REASONS = 3  # told where nothing can leave
HELD = 0.2  # share of the samples that judge; at least ALONE, where there are twice as many
BUDGETS = ("ratio", "params", "macs", "latency")


@dataclasses.dataclass(frozen=True)
class Prune(Pass):
    """Removes whole channels, attention heads and hidden units, so that weights and activations get smaller.

    Which slices must leave together is derived from the graph (see onnxslim.coupling). Which of them matter least is
    judged on the calibration data by Optimal Brain Surgeon: the error that is left in the outputs of the layers that
    read a channel, once their other inputs have taken over what they can. The layers that are left are then refitted
    by least squares, in the order of the graph, to give the outputs of the original model again. No labels, no
    gradients.

    Without ``ratio`` only what is nearly free leaves: the squared error of the model's worst output over its variance,
    measured on calibration samples that the fit has not seen, stays below ``tolerance``, its standard error included;
    where one output holds numbers of several kinds, as the boxes and scores of a detector, each kind may lose four
    times as much. Layer normalization axes, model inputs and outputs, whatever passes an operator without a rule, and
    branches that the data does not take stay as they are; the report names them.

    A budget removes more. ``ratio`` is what leaves; ``params``, ``macs`` and ``latency`` are what may stay: a fraction
    of the input's up to 1, an absolute number above 1. Widths are chosen over the whole network so that the errors of
    the outputs, measured per family, add up to the least (a knapsack); milliseconds come from kernel times measured on
    narrower models and are checked on the result. Widths are multiples of 16 where a layer is wide, with ``latency`` of
    the step that the kernels of this machine are measured to have. At most one budget can be given.

    With ``lossless`` only channels without any effect leave: dead and constant ones, and copies of others. The outputs
    stay what they were.

    Options:
        ratio: fraction of the parameters to remove (0 to 1), where it costs least: 0.3 is the same as params=0.7.
        params: parameters that may stay.
        macs: multiplications per sample that may stay.
        latency: time of one sample that may stay (above 1: milliseconds), on this machine.
        tolerance: squared error of the worst output over its variance that is nearly free, when there is no budget.
        protect: regular expressions; families whose name or weights match stay whole.
        only: regular expressions; only families whose name or weights match may shrink.
        overrides: the fraction of their units that leaves the families whose name or weights match a regular
            expression (the first one that does), whatever the budget would choose: {'layer4': 0.1, 'fc': 0.5}. A budget
            counts what they save, and chooses for the others; without one, these alone shrink.
        importance: what orders the channels of a family: obs (see above), variance (of a channel times its outgoing
            weights), magnitude (of all weights that leave with it) or median (those nearest to all others leave first).
        refit: refit the remaining weights (switch off only to see what it brings).
        lossless: remove only what provably has no effect.
        record: write what is kept of every weight to this file, as JSON.
        plan: remove what such a file says, instead of choosing. On the same model and data this gives the same weights.
    """

    name: ClassVar[str] = "prune"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    then: ClassVar[str] = "fuse(opset=0)"  # channels leave before it: a product of several is harder to make narrower
    needs_data: ClassVar[bool] = True

    ratio: float | None = None
    params: float | None = None
    macs: float | None = None
    latency: float | None = None
    tolerance: float = 5e-3
    protect: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    overrides: Mapping[str, float] = dataclasses.field(default_factory=dict)
    importance: Literal["obs", "variance", "magnitude", "median"] = "obs"
    refit: bool = True
    lossless: bool = False
    record: str | None = None
    plan: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in (*BUDGETS, "plan") if getattr(self, name) is not None]
        given += ["lossless"] if self.lossless else []
        self.require(len(given) < 2, f"{' and '.join(given)} are given: give one of them")
        self.require(self.ratio is None or 0 <= self.ratio < 1, f"ratio={self.ratio} must be at least 0 and below 1")
        for name in ("params", "macs", "latency"):
            value = getattr(self, name)
            self.require(value is None or value > 0, f"{name}={value} must be above 0: what may stay")
        self.require(self.tolerance >= 0, f"tolerance={self.tolerance} must not be negative")
        for pattern, share in self.overrides.items():
            self.require(0 <= share < 1, f"overrides: {pattern!r}: {share} must be at least 0 and below 1")
        choosing = [name for name in ("plan", "lossless") if getattr(self, name)]
        self.require(
            not (self.overrides and choosing), f"overrides and {''.join(choosing)} are given: give one of them"
        )
        for option in ("protect", "only", "overrides"):
            for pattern in getattr(self, option):
                try:
                    re.compile(pattern)
                except re.error as error:
                    self.require(False, f"{option}={pattern!r} is not a regular expression: {error}")

    @property
    def budgeted(self) -> bool:
        """True when the user has said how much must leave."""
        return bool(self.overrides) or any(getattr(self, name) is not None for name in (*BUDGETS, "plan"))

    @property
    def allowed(self) -> float | None:
        """What is nearly free; None where the user has said how much must leave, or nothing may be lost."""
        return None if self.budgeted or self.lossless else self.tolerance

    def careful(self, outcome: Outcome) -> Prune | None:
        """With a lower tolerance; None where the user has said how much must leave, or nothing may be lost."""
        if self.budgeted or self.lossless:
            return None
        errors = [v for name, v in outcome.stats.items() if name.startswith("error_")]
        return dataclasses.replace(self, tolerance=min([self.tolerance, *errors]) / CAREFUL)

    def apply(self, model: ir.Model, ctx: Context) -> Outcome:
        """Remove channels from ``model`` in place; families that cannot leave soundly are put back and named."""
        feed = ctx.calibration.feed(ctx.calibration[0])
        if self.lossless:
            return self._free(model, feed, ctx)
        whole: dict[str, str] = {}
        while True:
            before = model.clone()
            try:
                return self._remove(model, feed, whole, ctx)
            except safety.UnsoundError as error:
                if not error.families:
                    raise
                whole.update((name, f"put back: {error}") for name in error.families)
                model.graph = before.graph

    def _remove(
        self, model: ir.Model, feed: Mapping[str, np.ndarray], whole: Mapping[str, str], ctx: Context
    ) -> Outcome:
        """Remove channels of all families but those in ``whole``, which come with the reason."""
        coupled = coupling.analyze(model, feed, threads=ctx.threads)
        outcome = Outcome(skipped=[Skip(name, why) for name, why in coupled.frozen().items()])
        families = self._candidates(coupled, outcome)
        given, budget = self._overridden(families), self._budget()
        families = [f for f in families if f.name not in whole]
        if self.overrides and budget is None:
            outcome.skipped.extend(Skip(f.name, "no override names it") for f in families if f.name not in given)
            families = [f for f in families if f.name in given]
        outcome.skipped.extend(Skip(name, why) for name, why in whole.items())
        planned = {} if self.plan is None else plans.read(self.plan, families)
        if self.plan is not None:
            families = [f for f in families if f.name in planned]
        outcome.stats["families"] = len(families)
        if not families:
            if self.budgeted:
                ctx.warnings.append(_whole(outcome.skipped))
            return outcome
        if ctx.synthetic and not self.budgeted:
            outcome.skipped.append(Skip("*", "no calibration data: what is nearly free cannot be known; give a budget"))
            return outcome
        count = max(len(ctx.calibration), 1)
        fit, held_out = ctx.calibration.split(max(HELD, min(ALONE, count // 2) / count))
        measured = measure.factors(coupled, families, fit, held_out, ctx)
        if self.plan is None:
            orders, candidates = self._judge(coupled, families, given, measured, held_out, ctx)
        else:
            orders, candidates = [planned[f.name] for f in families], []
            for family in families:
                for site in family.sites:
                    measured[site].ridge = planned[family.name].ridge
        planner = Planner(coupled, families, orders, candidates, ctx)

        allowed = self.tolerance
        for attempt in range(ATTEMPTS):
            if self.plan is not None:
                counts = [len(o.units) for o in orders]
            elif budget is not None:
                counts = planner.budget(*budget, outcome)
            elif self.overrides:
                counts = [c.fixed or 0 for c in candidates]
            else:
                # The sum of what the families cost alone is only an estimate: try plans before refitting one.
                low, high = 0.0, 8 * self.tolerance
                for trial in range(TRIALS):
                    middle = high / 8 if trial == 0 else (low + high) / 2
                    atoms = planner.atoms(planner.within(middle))
                    tried = measure.sensitivity(coupled, measured, [atoms], held_out.spread(PROBES), ctx)[0]
                    low, high = (middle, high) if tried <= allowed else (low, middle)
                counts = planner.within(low)
            atoms = planner.atoms(counts)
            outcome.stats["plans"] = attempt + 1
            if not len(atoms):
                break
            masked, error = self._refitted(model, coupled, atoms, measured, fit, held_out, ctx, outcome)
            if self.budgeted or error <= self.tolerance:
                break
            allowed *= min(0.5, 0.7 * self.tolerance / error)
        else:
            outcome.skipped.append(Skip("*", f"nothing is nearly free: even the least cost an error of {error:.3g}"))
            return outcome
        for family, m in zip(families, counts, strict=True):
            if not m:
                why = f"one step of its {len(family.atoms)} channels costs more than elsewhere"
                why = "kept whole by overrides" if family.name in given else why
                why = "kept whole by the plan" if family.name in planned else why
                outcome.skipped.append(Skip(family.name, why))
        kept = plans.kept(coupled, atoms)
        outcome.stats.update(
            units=sum(len(f.atoms) for f in families),
            removed=int(sum(counts)),
            widths={f.name: [len(f.atoms), len(f.atoms) - m] for f, m in zip(families, counts, strict=True) if m},
        )
        if len(atoms):
            _copy_weights(masked, coupled)
            outcome.stats["oracle"] = self._cut(model, masked, coupled, atoms, feed, families, ctx)
        if self.record is not None:
            gone = [dataclasses.replace(o, units=o.units[:m]) for o, m in zip(orders, counts, strict=True)]
            plans.write(self.record, kept, families, gone)
        return outcome

    @staticmethod
    def _cut(
        model: ir.Model,
        masked: ir.Model,
        coupled: Coupling,
        atoms: np.ndarray,
        feed: Mapping[str, np.ndarray],
        families: Sequence[Family],
        ctx: Context,
    ) -> float:
        """Remove ``atoms`` from ``model``, which is that of ``coupled``; returns how far it is from the masked one.

        Raises:
            UnsoundError: with the families at fault.
        """
        before = model.clone()
        try:
            coupled.remove(atoms)
            return safety.check(masked, model, ctx)
        except (CheckError, ModelError) as error:
            alone = {f.name: np.intersect1d(f.atoms, atoms) for f in families}
            fault = safety.at_fault(before, feed, {name: own for name, own in alone.items() if len(own)}, ctx)
            raise safety.UnsoundError(str(error), fault) from error

    def _free(self, model: ir.Model, feed: Mapping[str, np.ndarray], ctx: Context) -> Outcome:
        """Remove from ``model`` what has no effect."""
        original = model.clone()
        outcome = Outcome()
        coupled = coupling.analyze(original, feed, threads=ctx.threads)
        families = self._candidates(coupled, outcome)
        found, left = free_channels.remove_free(model, feed, lambda c: self._candidates(c, Outcome()), ctx.threads)
        outcome.stats.update({"families": len(families), **found})
        if any(found.values()):
            outcome.stats["oracle"] = safety.check(original, model, ctx)
        if self.record is not None:
            plans.write(self.record, left)
        return outcome

    def _budget(self) -> tuple[str, float] | None:
        """What is budgeted, and how much of it may stay; None without a budget."""
        if self.ratio is not None:
            return "params", 1 - self.ratio
        given = ((n, float(v)) for n in ("params", "macs", "latency") if (v := getattr(self, n)) is not None)
        return next(given, None)

    def _overridden(self, families: Sequence[Family]) -> dict[str, int]:
        """The families whose widths are given, with the units that leave.

        Raises:
            UsageError: an expression matches none of ``families``.
        """
        found: dict[str, int] = {}
        for pattern, share in self.overrides.items():
            matching = [f for f in families if _matches(pattern, f)]
            self.require(
                bool(matching),
                f"overrides: {pattern!r} matches no family that may shrink: inspect --prunable lists them",
            )
            for family in matching:
                count = len(family.atoms)
                found.setdefault(family.name, min(round(share * count), count - 1))
        return found

    def _candidates(self, coupled: Coupling, outcome: Outcome) -> list[Family]:
        """Families that may shrink; those that the user protects are skipped."""
        families = []
        for family in coupled.families:
            if any(_matches(pattern, family) for pattern in self.protect):
                outcome.skipped.append(Skip(family.name, "protected"))
            elif self.only and not any(_matches(pattern, family) for pattern in self.only):
                outcome.skipped.append(Skip(family.name, "matches none of the patterns of only"))
            else:
                families.append(family)
        return families

    def _most(self) -> float:
        """The share of a family that may leave."""
        budget = self._budget()
        if budget is None:
            return MOST
        kept = budget[1]
        return 0.95 if kept > 1 else min(0.95, 2 * (1 - kept) + 0.25)

    def _judge(
        self,
        coupled: Coupling,
        families: list[Family],
        given: Mapping[str, int],
        measured: Mapping[Site, measure.Factor],
        held_out: Data,
        ctx: Context,
    ) -> tuple[list[surgeon.Order], list[allocate.Candidate]]:
        """The order of removal in each family, and what each step costs in error of the model's outputs."""
        orders: list[surgeon.Order] = []
        probes: list[list[int]] = []
        limits = []
        for family in ctx.progress.track(families, total=len(families), label="rank channels"):
            count = len(family.atoms)
            fixed = given.get(family.name)
            limit = max(1, min(count - 1, int(np.ceil(self._most() * count)) if fixed is None else fixed))
            told = measure.contributions(coupled, family, measured)
            first = measure.ranked(self.importance, coupled, family, told)
            found = surgeon.order(told, count, limit=limit, first=first)
            for site in family.sites:
                measured[site].ridge = found.ridge
            orders.append(found)
            limits.append(limit)
            # Where nothing is felt yet a ratio of two zeros says nothing.
            felt = int(np.searchsorted(found.error, FELT)) + 1
            probes.append(sorted({min(limit, max(1, int(part * limit), felt)) for part in LEVELS}))
        tried = [f.atoms[o.units[:m]] for f, o, ms in zip(families, orders, probes, strict=True) for m in ms]
        errors = iter(measure.sensitivity(coupled, measured, tried, held_out.spread(PROBES), ctx))
        candidates = []
        # Only a budget of time is worth plans that differ from machine to machine.
        widest = allocate.WIDEST if self.latency is None else kernel_steps.here()
        for family, found, marks, limit in zip(families, orders, probes, limits, strict=True):
            scales = [next(errors) / max(float(found.error[m - 1]), FELT) for m in marks]
            curve = found.error * np.interp(np.arange(1, len(found.error) + 1), marks, scales)
            step = allocate.step_of(measure.channels(coupled, family), len(family.atoms), widest)
            rising, fixed = np.maximum.accumulate(curve), given.get(family.name)
            candidates.append(allocate.Candidate(len(family.atoms), rising, step, limit, fixed))
        return orders, candidates

    def _refitted(
        self,
        model: ir.Model,
        coupled: Coupling,
        atoms: np.ndarray,
        measured: Mapping[Site, measure.Factor],
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
        trials = [(masked, 0, "masked")]
        if self.refit and not ctx.synthetic and layers:
            closed = masked.clone()
            for site, factor in measured.items():
                if factor.layer is not None and (removed := gone(site.labels)).any():
                    measure.compensate(closed, factor, removed)
            trials.append((closed, len(measured), "closed"))
            if len(ctx.calibration) > 1:  # with a single sample nothing could tell a good refit from a bad one
                moved = _moved(model, coupled, layers, gone)
                refitted = closed.clone()
                count = refit(model, refitted, moved, lambda item: gone(item.site.labels), fit, held_out, ctx)
                trials.append((refitted, count, "refitted"))
        errors = measure.noise(model, [trial for trial, _, _ in trials], held_out, ctx)
        outcome.stats.update({f"error_{name}": error for (_, _, name), error in zip(trials, errors, strict=True)})
        least = min(range(len(trials)), key=lambda k: (not np.isfinite(errors[k]), errors[k]))
        best, changed, _ = trials[least]
        if len(trials) == 1:
            return best, errors[0]
        outcome.stats["refitted"] = changed
        if best is masked:
            outcome.skipped.append(Skip("*", f"refitting was dropped: it does not lower the error of {errors[0]:.3g}"))
        return best, errors[least]


def _matches(pattern: str, family: Family) -> bool:
    """True when the family's name or one of its weights matches."""
    return any(re.search(pattern, name) for name in (family.name, *(v.name or "" for v, _ in family.weights)))


def _moved(
    model: ir.Model, coupled: Coupling, layers: list[Layer], gone: Callable[[Labels], np.ndarray]
) -> list[Layer]:
    """Layers whose input is changed by the removal, in the order of the graph."""
    changed: set[ir.Value] = set()
    felt = {site.node for site in coupled.sites if gone(site.labels).any()}
    by_node = {item.site.node: item for item in layers}
    result = []
    for node in walk(model.graph):
        if node in felt or any(v in changed for v in (*node.inputs, *captured(node)) if v is not None):
            changed.update(node.outputs)
            # What a branch does is not seen on every sample: layers in there are refitted in closed form only.
            if node in by_node and node.graph is model.graph:
                result.append(by_node[node])
    return result


def _copy_weights(source: ir.Model, coupled: Coupling) -> None:
    """Give the analyzed model the weights of ``source``, and the biases that were added to it."""
    target = coupled.model
    for name, value in source.graph.initializers.items():
        array = value.const_value
        own = target.graph.initializers.get(name)
        if own is not None and array is not own.const_value and array is not None:
            set_constant(own, array.numpy())
    nodes = by_output(target.graph)
    for node in walk(source.graph):
        own_node = nodes.get(node.outputs[0].name or "")
        bias = node.inputs[2] if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2 else None
        if own_node is None or bias is None or (len(own_node.inputs) > 2 and own_node.inputs[2] is not None):
            continue
        own_node.resize_inputs(3)
        value = ir.Value(name=bias.name, const_value=bias.const_value, shape=bias.shape, type=bias.type)
        target.graph.register_initializer(value)
        own_node.replace_input_with(2, value)
        coupled.labels[value] = [coupled.labels[own_node.outputs[0]][1]]  # it shrinks like the output


def _whole(skipped: Sequence[Skip]) -> str:
    """Why a budget stays unmet where no channel can leave: the commonest reasons."""
    reasons = Counter(skip.reason for skip in skipped).most_common(REASONS)
    told = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "it has no channels"
    return f"prune: no channels can leave this model, whatever the budget: {told}"
