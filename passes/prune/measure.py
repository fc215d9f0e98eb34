"""What the choice of channels stands on: moments of what contractions read, and what a family means to the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import coupling, runtime
from onnxslim.calibration import Moments, RowMoments, collect
from onnxslim.channels import Labels
from onnxslim.contract import Context
from onnxslim.coupling import Coupling, Family, Site
from onnxslim.data import Data
from onnxslim.graph import attribute, constant, is_constant, is_op, set_constant
from onnxslim.passes.prune.importance import Contribution
from onnxslim.passes.prune.layers import Layer, layer

ROWS = 24_000  # observations per contraction


@dataclasses.dataclass
class Factor:
    """A contraction as a matrix (out, n) over its channels, with the moments (n, n) and means (n,) of what it reads.

    ``layer`` is set where the weights can be refitted.
    """

    matrix: np.ndarray
    moments: np.ndarray
    mean: np.ndarray
    layer: Layer | None


def factors(coupled: Coupling, families: Sequence[Family], ctx: Context) -> dict[Site, Factor]:
    """Measure every contraction that some family feeds, in one pass over the calibration data."""
    sites = {id(site): site for family in families for site in family.sites}
    limit = max(-(-ROWS // max(len(ctx.calibration), 1)), 16)
    statistics: dict[tuple[str, int], RowMoments] = {}
    for site in sites.values():
        for value, axis, rank in _operands(site):
            statistics.setdefault((value, axis - rank), RowMoments(_rows(axis, limit)))
    attached: dict[str, list[RowMoments]] = {}
    for (value, _), statistic in statistics.items():
        attached.setdefault(value, []).append(statistic)
    collect(coupled.model, attached, ctx, label="measure channels")
    return {site: _factor(site, {key: s.moments for key, s in statistics.items()}) for site in sites.values()}


def contributions(coupled: Coupling, family: Family, measured: Mapping[Site, Factor]) -> list[Contribution]:
    """What the contractions that read ``family`` say about its units."""
    return [
        Contribution(measured[site].matrix, measured[site].moments, units(coupled, family, site.labels))
        for site in family.sites
    ]


def units(coupled: Coupling, family: Family, labels: Labels) -> np.ndarray:
    """The unit of ``family`` that removes each position of an axis, -1 where none does: (n,)."""
    unit_of = np.full(len(coupled.solution.root), -1)
    unit_of[family.atoms] = np.arange(len(family.atoms))
    return coupled.solution.spread(unit_of)[labels]


def channels(coupled: Coupling, family: Family) -> int:
    """Width of the widest axis that the family makes up."""
    return max(int((units(coupled, family, site.labels) >= 0).sum()) for site in family.sites)


def savings(coupled: Coupling, family: Family) -> tuple[float, float]:
    """Parameters and MACs that leave with one unit, the MACs for the sample that was analyzed."""
    parameters = macs = 0.0
    for value, axis in family.weights:
        labels = coupled.labels[value][axis]
        assert labels is not None and value.const_value is not None
        share = (units(coupled, family, labels) >= 0).sum() / len(family.atoms) / len(labels)
        parameters += value.const_value.size * share
        macs += value.const_value.size * share * _uses(coupled, value)
    return parameters, macs


def sensitivity(
    coupled: Coupling, measured: Mapping[Site, Factor], removals: Sequence[np.ndarray], data: Data, ctx: Context
) -> list[float]:
    """For each array of atoms: the relative squared error of the outputs when just these leave.

    The layers that read them are refitted in closed form from their own moments, as the whole network will be later.
    """
    model = coupled.model
    expected = [
        runtime.run(runner, feed) for runner in [runtime.load(model, threads=ctx.threads)] for feed in data.feeds()
    ]
    result = []
    for atoms in ctx.progress.track(removals, total=len(removals), label="try families"):
        if not len(atoms):
            result.append(0.0)
            continue
        gone = coupled.removed(atoms)
        trial = model.clone()
        coupling.mask(trial, coupled.sites, gone)
        for site, factor in measured.items():
            removed = gone(site.labels)
            if factor.layer is not None and removed.any():
                _compensate(trial, factor.layer, factor, removed)
        runner = runtime.load(trial, threads=ctx.threads)
        errors = [output_error(e, runtime.run(runner, f)) for e, f in zip(expected, data.feeds(), strict=True)]
        result.append(float(np.mean(errors)))
    return result


def output_error(expected: Mapping[str, object], got: Mapping[str, object]) -> float:
    """Mean over the float outputs of the squared error relative to the squared output."""
    errors = []
    for name, want in expected.items():
        have = got[name]
        if isinstance(want, np.ndarray) and isinstance(have, np.ndarray) and want.dtype.kind == "f" and want.size:
            energy = float(np.sum(np.square(want, dtype=np.float64)))
            errors.append(float(np.sum(np.square(want - have, dtype=np.float64))) / max(energy, 1e-30))
    return float(np.mean(errors)) if errors else 0.0


def _compensate(model: ir.Model, item: Layer, factor: Factor, removed: np.ndarray) -> None:
    """Refit one layer to the channels that stay, V = (M G_:K + λ M_K)(G_KK + λI)⁻¹ and the bias from the means."""
    keep = ~removed
    kept = factor.moments[np.ix_(keep, keep)]
    ridge = 1e-2 * max(float(np.mean(np.diag(kept))), 1e-12)
    right = factor.matrix @ factor.moments[:, keep] + ridge * factor.matrix[:, keep]
    fitted = np.zeros_like(factor.matrix)
    fitted[:, keep] = np.linalg.solve(kept + ridge * np.eye(len(kept)), right.T).T
    taps = item.taps
    shift = (factor.matrix - fitted).reshape(-1, taps, len(keep)).sum(axis=1) @ factor.mean
    item.write(model, np.moveaxis(fitted.reshape(-1, taps, len(keep)), 1, 2).reshape(-1, taps * len(keep)))
    bias = item.bias(model)
    if bias is not None:
        old = np.asarray(constant(bias))
        set_constant(bias, (old + shift).astype(old.dtype))


def _operands(site: Site) -> list[tuple[str, int, int]]:
    """The values whose channels a contraction multiplies: (name, axis, rank), one or two of them."""
    value = site.node.inputs[site.data]
    assert value is not None
    found = [(value.name or "", site.axis, site.rank)]
    if site.weight < 0 and site.node.op_type in ("MatMul", "Gemm"):
        other = site.node.inputs[1 - site.data]
        assert other is not None
        if site.node.op_type == "MatMul":
            axis = site.rank - (2 if site.data == 0 else 1)
        else:
            axis = 1 if attribute(site.node, "transB", 0) else 0
        found.append((other.name or "", axis, site.rank))
    return found


def _rows(axis: int, limit: int) -> Callable[[np.ndarray], np.ndarray]:
    """Turn a value into at most ``limit`` rows over the channels of ``axis``."""

    def rows(array: np.ndarray) -> np.ndarray:
        flat = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])
        return flat[np.linspace(0, len(flat) - 1, limit).astype(int)] if len(flat) > limit else flat

    return rows


def _factor(site: Site, moments: Mapping[tuple[str, int], Moments]) -> Factor:
    found = [moments[value, axis - rank] for value, axis, rank in _operands(site)]
    n = len(site.labels)
    if any(m.empty for m in found):
        return Factor(np.zeros((1, n)), np.zeros((n, n)), np.zeros(n), None)
    mean = found[0].mean()
    if site.weight < 0:
        # Both factors vary: the outputs are sums over n products, whose moments factorize when they are independent.
        second = [m.second() for m in found]
        return Factor(np.ones((1, n)), second[0] * second[1] if len(second) > 1 else second[0], mean, None)
    weight = np.asarray(constant(site.node.inputs[site.weight]), np.float64)
    covariance = _shrunk(found[0])
    if site.groups > 1 and site.node.op_type != "ConvTranspose":  # (out, n / groups, ...): groups side by side
        parts = weight.reshape(site.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        group = np.arange(n) // (n // site.groups)
        # Channels of different groups never meet in one output: they cannot take over from each other.
        return Factor(
            np.moveaxis(parts, 2, 1).reshape(n, -1).T, covariance * (group[:, None] == group[None]), mean, None
        )
    return Factor(np.moveaxis(weight, site.weight_axis, -1).reshape(-1, n), covariance, mean, layer(site))


def _shrunk(moments: Moments) -> np.ndarray:
    """Covariance drawn towards its diagonal the more, the fewer observations there are per channel.

    From fewer observations than channels every channel looks like a combination of others.
    """
    covariance = moments.covariance()
    n = len(covariance)
    weight = min(1.0, n / max(moments.count, 1)) ** 2
    return (1 - weight) * covariance + weight * np.diag(np.diag(covariance))


def _uses(coupled: Coupling, value: ir.Value) -> float:
    """How often each element of a weight is multiplied."""
    total = 0.0
    for use in value.uses():
        node = use.node
        if not is_op(node, "Conv", "ConvTranspose", "Gemm", "MatMul") or not is_constant(value) or use.idx > 1:
            continue
        shape = coupled.shape(value)
        if node.op_type == "ConvTranspose":
            data = node.inputs[0]
            assert data is not None
            total += float(np.prod(coupled.shape(data))) / shape[0]
            continue
        out = shape[0] if node.op_type == "Conv" or attribute(node, "transB", 0) else shape[-1]
        total += float(np.prod(coupled.shape(node.outputs[0]))) / out
    return total
