"""Structured pruning of channels without retraining."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnxslim import coupling, runtime
from onnxslim.calibration import Moments, RowMoments, collect
from onnxslim.channels import Labels
from onnxslim.contract import Context, Effect, Outcome, Pass, Skip
from onnxslim.coupling import Coupling, Family, Site
from onnxslim.data import Data
from onnxslim.errors import CheckError
from onnxslim.graph import attribute, constant, set_constant
from onnxslim.passes.prune import allocate, importance
from onnxslim.passes.prune.layers import Layer, layer
from onnxslim.passes.prune.reconstruct import refit

ROWS = 24_000  # observations per contraction for the choice of channels
ORACLE = 1e-3  # relative difference allowed between the masked and the pruned model at run time (float32 rounding)


@dataclasses.dataclass(frozen=True)
class Prune(Pass):
    """Removes whole channels, attention heads and hidden units, so that weights and activations get smaller.

    Which slices must leave together is derived from the graph (see onnxslim.coupling). Which of them matter least is
    judged on the calibration data by Optimal Brain Surgeon: the error that is left in the outputs of the layers that
    read a channel, once their other inputs have taken over what they can. The layers that are left are then refitted
    by least squares, in the order of the graph, to give the outputs of the original model again. No labels, no
    gradients.

    Without ``ratio`` a family of channels gives up what costs at most ``tolerance`` of its readers' output energy,
    which is nearly free. Layer normalization axes, model inputs and outputs, and whatever passes an operator without
    a rule stay as they are; the report names them.

    Options:
        ratio: remove as many parameters as cutting this fraction of all channels would (0 to 1), where it costs least.
        tolerance: relative squared error that a family may cost when no ratio is given.
        protect: regular expressions; families whose name or weights match stay whole.
        refit: refit the remaining weights (switch off only to see what it brings).
    """

    name: ClassVar[str] = "prune"
    effect: ClassVar[Effect] = Effect.LOSSY
    wants: ClassVar[Sequence[str]] = ("simplify", "fold")
    needs_data: ClassVar[bool] = True

    ratio: float | None = None
    tolerance: float = 2e-3
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
        skipped = [Skip(name, why) for name, why in coupled.frozen().items()]
        families, kept = self._candidates(coupled)
        skipped += kept
        outcome = Outcome({"families": len(families)}, skipped)
        if not families:
            return outcome
        if ctx.synthetic and self.ratio is None:
            outcome.skipped.append(Skip("*", "no calibration data: what is nearly free cannot be known; give a ratio"))
            return outcome
        orders = self._judge(coupled, families, ctx)
        counts = self._counts(coupled, families, orders)
        chosen = [o.units[:m] for o, m in zip(orders, counts, strict=True)]
        atoms = np.concatenate([np.empty(0, np.int64), *(f.atoms[u] for f, u in zip(families, chosen, strict=True))])
        for family, m in zip(families, counts, strict=True):
            if not m:
                why = f"nothing could leave: removing one step of {len(family.atoms)} channels costs too much"
                outcome.skipped.append(Skip(family.name, why))
        outcome.stats.update(
            units=sum(len(f.atoms) for f in families),
            removed=int(sum(counts)),
            widths={f.name: [len(f.atoms), len(f.atoms) - m] for f, m in zip(families, counts, strict=True) if m},
        )
        if not len(atoms):
            return outcome
        masked = self._refitted(model, coupled, atoms, ctx, outcome)
        _copy_weights(masked, model)
        coupled.remove(atoms)
        _check_oracle(masked, model, ctx)
        return outcome

    def _candidates(self, coupled: Coupling) -> tuple[list[Family], list[Skip]]:
        """Families that may shrink, and those that the user protects."""
        families, skipped = [], []
        for family in coupled.families:
            names = [family.name, *(v.name or "" for v, _ in family.weights)]
            if any(re.search(p, n) for p in self.protect for n in names):
                skipped.append(Skip(family.name, "protected"))
            else:
                families.append(family)
        return families, skipped

    def _judge(self, coupled: Coupling, families: list[Family], ctx: Context) -> list[importance.Order]:
        """The order of removal in each family, from the second moments of what its readers read."""
        sites = {id(site): site for family in families for site in family.sites}
        wanted = {key: _operands(site) for key, site in sites.items()}
        statistics: dict[str, dict[int, RowMoments]] = {}
        for operands in wanted.values():
            for value, axis, rank in operands:
                statistics.setdefault(value, {}).setdefault(axis - rank, RowMoments(_sampler(axis, ctx)))
        collect(coupled.model, {v: list(m.values()) for v, m in statistics.items()}, ctx, label="measure channels")
        moments = {(v, axis): m.moments for v, by_axis in statistics.items() for axis, m in by_axis.items()}
        factors = {key: _contribution(site, wanted[key], moments) for key, site in sites.items()}
        orders = []
        for family in ctx.progress.track(families, label="rank channels"):
            contributions = []
            for site in family.sites:
                matrix, second = factors[id(site)]
                contributions.append(importance.Contribution(matrix, second, _units(coupled, family, site.labels)))
            count = len(family.atoms)
            limit = count - 1 if self.ratio is None else min(count - 1, int(np.ceil(2 * self.ratio * count)) + 1)
            tolerance = self.tolerance if self.ratio is None else np.inf
            orders.append(importance.order(contributions, count, limit=limit, tolerance=tolerance))
        return orders

    def _counts(self, coupled: Coupling, families: list[Family], orders: list[importance.Order]) -> list[int]:
        candidates = []
        for family, order in zip(families, orders, strict=True):
            channels = max(len(_own(coupled, family, site.labels)) for site in family.sites)
            candidates.append(
                allocate.Candidate(
                    len(family.atoms),
                    order.error,
                    _parameters(coupled, family),
                    allocate.step_of(channels, len(family.atoms)),
                )
            )
        if self.ratio is None:
            return allocate.within(candidates, self.tolerance)
        return allocate.at_ratio(candidates, self.ratio)

    def _refitted(
        self, model: ir.Model, coupled: Coupling, atoms: np.ndarray, ctx: Context, outcome: Outcome
    ) -> ir.Model:
        """The masked model, refitted where that helps on samples the fit has not seen."""
        gone = coupled.removed(atoms)
        layers = [found for site in coupled.sites if (found := layer(site)) is not None]
        masked = model.clone()
        coupling.mask(masked, coupled.sites, gone)
        if not self.refit or ctx.synthetic or not layers:
            return masked
        fit, held_out = ctx.calibration.split(0.1)
        moved = _moved(model, coupled, layers, gone)
        refitted = masked.clone()
        count = refit(model, refitted, moved, lambda item: gone(item.site.labels), fit, ctx)
        before, after = (_error(model, candidate, held_out, ctx) for candidate in (masked, refitted))
        outcome.stats.update(error_masked=before, error_refitted=after)
        if after < before:
            outcome.stats["refitted"] = count
            return refitted
        outcome.skipped.append(Skip("*", f"refitting was dropped: error {after:.3g} instead of {before:.3g}"))
        return masked


def _operands(site: Site) -> list[tuple[str, int, int]]:
    """The values whose channels a contraction multiplies: (name, axis, rank), one or two of them."""
    value = site.node.inputs[site.data]
    assert value is not None
    found = [(value.name or "", site.axis, site.rank)]
    if site.weight < 0 and site.node.op_type in ("MatMul", "Gemm"):
        other = site.node.inputs[1 - site.data]
        assert other is not None
        rank = site.rank
        if site.node.op_type == "MatMul":
            found.append((other.name or "", rank - 2 if site.data == 0 else rank - 1, rank))
        else:
            found.append((other.name or "", 1 if attribute(site.node, "transB", 0) else 0, rank))
    return found


def _sampler(axis: int, ctx: Context) -> Callable[[np.ndarray], np.ndarray]:
    """Turn a value into rows over the channels of ``axis``, a share of `ROWS` per sample."""
    limit = max(-(-ROWS // max(len(ctx.calibration), 1)), 16)

    def rows(array: np.ndarray) -> np.ndarray:
        flat = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
        if len(flat) > limit:
            flat = flat[np.linspace(0, len(flat) - 1, limit).astype(int)]
        return flat

    return rows


def _contribution(
    site: Site, operands: list[tuple[str, int, int]], moments: Mapping[tuple[str, int], Moments]
) -> tuple[np.ndarray, np.ndarray]:
    """Factor (out, n) and second moments (n, n) of a contraction; see importance."""
    found = [moments[value, axis - rank] for value, axis, rank in operands]
    n = len(site.labels)
    if any(m.empty for m in found):
        return np.zeros((1, n)), np.zeros((n, n))
    if site.weight >= 0:
        weight = np.asarray(constant(site.node.inputs[site.weight]), np.float64)
        if site.groups > 1 and site.node.op_type != "ConvTranspose":  # (out, n / groups, ...): channels side by side
            inner = weight.reshape(site.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
            matrix = np.moveaxis(inner, 2, 1).reshape(n, -1).T
            # Channels of different groups never meet in one output: they cannot take over from each other.
            same = np.arange(n) // (n // site.groups)
            return matrix, found[0].covariance() * (same[:, None] == same[None])
        matrix = np.moveaxis(weight, site.weight_axis, -1).reshape(-1, n)
        return matrix, found[0].covariance()
    # Both factors vary: the outputs are sums over n products, whose moments factorize when the factors are independent.
    second = [m.second() for m in found]
    return np.ones((1, n)), second[0] * second[1] if len(second) > 1 else second[0]


def _own(coupled: Coupling, family: Family, labels: Labels) -> np.ndarray:
    """Positions on an axis that some unit of ``family`` removes."""
    return np.flatnonzero(_units(coupled, family, labels) >= 0)


def _units(coupled: Coupling, family: Family, labels: Labels) -> np.ndarray:
    """The unit of ``family`` that removes each position of an axis, -1 where none does: (n,)."""
    solution = coupled.solution
    unit_of = np.full(len(solution.root), -1)
    unit_of[family.atoms] = np.arange(len(family.atoms))
    return solution.spread(unit_of)[labels]


def _parameters(coupled: Coupling, family: Family) -> int:
    """Weights that leave with one unit."""
    total = 0
    for value, axis in family.weights:
        labels = coupled.labels[value][axis]
        assert labels is not None and value.const_value is not None
        share = len(_own(coupled, family, labels)) / len(family.atoms) / len(labels)
        total += round(value.const_value.size * share)
    return total


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
    """Relative squared error of all float outputs together."""
    runners = [runtime.load(m, threads=ctx.threads) for m in (original, candidate)]
    error = energy = 0.0
    for feed in data.feeds():
        expected, got = (runtime.run(r, feed) for r in runners)
        for name, array in expected.items():
            if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.size:
                scale = float(np.mean(np.square(array, dtype=np.float64))) or 1.0
                error += float(np.mean(np.square(array - got[name], dtype=np.float64))) / scale
                energy += 1
    return error / max(energy, 1)


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
