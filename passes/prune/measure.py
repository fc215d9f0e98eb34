"""What the choice of channels stands on: moments of what contractions read, and what a family means to the outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxslim import coupling, runtime
from onnxslim.calibration import Moments, RowMoments, collect
from onnxslim.channels import Labels
from onnxslim.contract import Context
from onnxslim.coupling import Coupling, Family, Site
from onnxslim.data import Data
from onnxslim.frontier import Frontier
from onnxslim.graph import attribute, by_output, constant, set_constant, subgraphs
from onnxslim.noise import Gap, share
from onnxslim.passes.prune.importance import RIDGE, Contribution
from onnxslim.passes.prune.layers import Layer, layer
from onnxslim.restoring import DOUBT
from onnxslim.results import Told

ROWS = 24_000  # observations per contraction
LOST = 1e6  # the noise of outputs that are lost altogether: a number that can be added up


@dataclasses.dataclass
class Factor:
    """A contraction as a matrix (out, n) over its channels, with the second moments (n, n) of what it reads.

    Moments are kept in float32: they are summed in float64, and all layers have theirs at once.

    Attributes:
        moments, held: of the samples that are fitted, and of those held back (about the mean of the former).
        mean: of the samples that are fitted (n,).
        layer: set where the weights can be refitted.
        ridge: the relative λ to refit with.
    """

    matrix: np.ndarray
    moments: np.ndarray
    held: np.ndarray | None
    mean: np.ndarray
    layer: Layer | None
    ridge: float = RIDGE


def factors(
    coupled: Coupling, families: Sequence[Family], fit: Data, held_out: Data, ctx: Context
) -> dict[Site, Factor]:
    """Measure every contraction that some family feeds, in one pass over the calibration data."""
    sites = {id(site): site for family in families for site in family.sites}
    limit = max(-(-ROWS // max(len(fit), 1)), 16)
    parts = [_moments(coupled.model, sites.values(), limit, data, ctx) for data in (fit, held_out)]
    last = {key: site for site in sites.values() for key in _keys(site)}
    result = {}
    for site in sites.values():
        result[site] = _factor(site, *parts)
        for key in _keys(site):
            if last[key] is site:  # what is summed in float64 is given back as soon as nothing reads it
                for part in parts:
                    part.pop(key, None)
    return result


def _moments(
    model: ir.Model, sites: Iterable[Site], limit: int, data: Data, ctx: Context
) -> dict[tuple[str, int], Moments]:
    """Of what ``sites`` read, at most ``limit`` rows per sample; filed under `_keys`."""
    statistics: dict[tuple[str, int], RowMoments] = {}
    for site in sites:
        for key in _keys(site):
            statistics.setdefault(key, RowMoments(_rows(key[1], limit)))
    attached: dict[str, list[RowMoments]] = {}
    for (value, _), statistic in statistics.items():
        attached.setdefault(value, []).append(statistic)
    collect(model, attached, ctx, data=data, label="measure channels")
    return {key: s.moments for key, s in statistics.items()}


def contributions(coupled: Coupling, family: Family, measured: Mapping[Site, Factor]) -> list[Contribution]:
    """What the contractions that read ``family`` say about its units."""
    return [
        Contribution(
            np.asarray(factor.matrix, np.float64), factor.moments, units(coupled, family, site.labels), factor.held
        )
        for site in family.sites
        for factor in [measured[site]]
    ]


def units(coupled: Coupling, family: Family, labels: Labels) -> np.ndarray:
    """The unit of ``family`` that removes each position of an axis, -1 where none does: (n,)."""
    unit_of = np.full(len(coupled.solution.root), -1)
    unit_of[family.atoms] = np.arange(len(family.atoms))
    return coupled.solution.spread(unit_of)[labels]


def channels(coupled: Coupling, family: Family) -> int:
    """Width of the widest axis that the family makes up."""
    return max(int((units(coupled, family, site.labels) >= 0).sum()) for site in family.sites)


def ranked(kind: str, coupled: Coupling, family: Family, told: Sequence[Contribution]) -> np.ndarray | None:
    """Units in the order in which a plain criterion lets them leave; None for the surgeon's own order.

    variance: of a channel, times the square of its outgoing weights (An et al., arXiv:2312.11983). magnitude: the norm
    of all weights that leave with the unit. median: its distance to all other units (He et al., arXiv:1811.00250).
    """
    count = len(family.atoms)
    if kind == "obs":
        return None
    if kind == "variance":
        scores = np.zeros(count)
        for c in told:
            energy = max(float(np.sum((c.matrix @ c.moments) * c.matrix)), 1e-30)
            inside = c.units >= 0
            each = np.diag(c.moments) * np.sum(c.matrix**2, axis=0) / energy
            scores += np.bincount(c.units[inside], each[inside], minlength=count)
        return np.argsort(scores, kind="stable")
    rows = vectors(coupled, family)
    squares = np.sum(rows**2, axis=1)
    if kind == "magnitude":
        return np.argsort(squares, kind="stable")
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * rows @ rows.T, 0))
    return np.argsort(distances.sum(axis=1), kind="stable")


def vectors(coupled: Coupling, family: Family) -> np.ndarray:
    """All weights that leave with each unit, side by side, every tensor scaled to a mean square of 1: (units, ·)."""
    count = len(family.atoms)
    parts = []
    for value, axis in family.weights:
        labels = coupled.labels[value][axis]
        array = constant(value)
        if labels is None or array is None or array.dtype.kind != "f":
            continue
        of = units(coupled, family, labels)
        rows = np.moveaxis(array, axis, 0).reshape(len(labels), -1).astype(np.float64)
        rows = rows / max(float(np.sqrt(np.mean(rows**2))), 1e-30)
        each = [rows[of == unit].ravel() for unit in range(count)]
        if len({len(e) for e in each}) == 1:
            parts.append(np.stack(each))
    return np.concatenate(parts, axis=1) if parts else np.zeros((count, 0))


def sensitivity(
    coupled: Coupling, measured: Mapping[Site, Factor], removals: Sequence[np.ndarray], data: Data, ctx: Context
) -> list[float]:
    """For each array of atoms: the noise of the outputs (`onnxslim.noise`) when just these leave, at most `LOST`.

    The layers that read them are refitted in closed form from their own moments, as the whole network will be later.
    """
    told = Told(coupled.model, ctx.threads)
    runner = runtime.load(told.model, threads=ctx.threads)
    expected = []
    for feed in data.feeds():
        outputs = runtime.run(runner, feed)
        expected.append((outputs, told.exact(feed, runtime.arrays(outputs))))
    whole = told.model.clone()
    # Whatever a removal adds to the graph is there from the start: then only weights change from one to the next.
    masks = coupling.add_masks(whole, [site for site in coupled.sites if site.weight < 0])
    for factor in measured.values():
        if factor.layer is not None:
            factor.layer.bias(whole)
    first = _places(whole, coupled, masks)
    errors = np.zeros(len(removals))
    frontier = Frontier(data, threads=ctx.threads)
    places = {k: first(coupled.removed(atoms)) for k, atoms in enumerate(removals) if len(atoms)}
    # In the order of the graph: what lies in front of a family is run once for all that come behind it.
    for k in ctx.progress.track(sorted(places, key=places.__getitem__), total=len(places), label="try families"):
        trial = whole.clone()
        gone = coupled.removed(removals[k])
        own = {site: trial.graph.initializers[value.name or ""] for site, value in masks.items()}
        coupling.mask(trial, coupled.sites, gone, own)
        for site, factor in measured.items():
            removed = gone(site.labels)
            if factor.layer is not None and removed.any():
                compensate(trial, factor, removed)
        frontier.advance(whole, places[k])
        behind = {value for node in list(trial.graph)[frontier.place :] for value in node.outputs}
        part = frontier.part(trial, [value.name or "" for value in trial.graph.outputs if value in behind])
        runner = runtime.load(part, threads=ctx.threads)
        got = (runtime.run(runner, feed) for feed in frontier.feeds())
        pairs = zip(expected, got, strict=True)
        found = [exact.gaps(runtime.arrays({**outputs, **some})) for (outputs, exact), some in pairs]
        errors[k] = min(share(found), LOST)
    return errors.tolist()


def _places(
    model: ir.Model, coupled: Coupling, masks: Mapping[Site, ir.Value]
) -> Callable[[Callable[[Labels], np.ndarray]], int]:
    """A function from a removal to the position of the first node of the main graph that it changes."""
    place = {node: k for k, node in enumerate(model.graph)}
    place |= {n: k for node, k in place.items() for body in subgraphs(node) for n in body.all_nodes()}
    nodes = by_output(model.graph)
    earliest: dict[Site, int] = {}
    for site in coupled.sites:
        value = masks[site] if site.weight < 0 else nodes[site.node.outputs[0].name or ""].inputs[site.weight]
        assert value is not None
        earliest[site] = min(place[use.node] for use in value.uses())
    return lambda gone: min((k for site, k in earliest.items() if gone(site.labels).any()), default=0)


def noise(original: ir.Model, candidates: Sequence[ir.Model], data: Data, ctx: Context) -> list[float]:
    """The noise of the outputs of each candidate (`onnxslim.noise`), and a standard error more.

    So that it holds on other samples of the kind, too, where there are few to judge by.
    """
    told = Told(original, ctx.threads)
    first, *others = (runtime.load(told.of(m), threads=ctx.threads) for m in (original, *candidates))
    found: list[list[list[Gap | None]]] = [[] for _ in others]
    for feed in data.feeds():
        exact = told.exact(feed, runtime.arrays(runtime.run(first, feed)))
        for runner, gaps in zip(others, found, strict=True):
            gaps.append(exact.gaps(runtime.arrays(runtime.run(runner, feed))))
    return [share(gaps, DOUBT) for gaps in found]


def compensate(model: ir.Model, factor: Factor, removed: np.ndarray) -> None:
    """Refit one layer to the channels that stay, V = (M G_:K + λ M_K)(G_KK + λI)⁻¹ and the bias from the means."""
    item = factor.layer
    if item is None or removed.all():
        return
    keep = ~removed
    moments = np.asarray(factor.moments, np.float64)
    kept = moments[np.ix_(keep, keep)]
    ridge = factor.ridge * max(float(np.mean(np.diag(kept))), 1e-12)
    matrix = np.asarray(factor.matrix, np.float64)
    right = matrix @ moments[:, keep] + ridge * matrix[:, keep]
    fitted = np.zeros_like(matrix)
    fitted[:, keep] = np.linalg.solve(kept + ridge * np.eye(len(kept)), right.T).T
    taps = item.taps
    shift = (matrix - fitted).reshape(-1, taps, len(keep)).sum(axis=1) @ factor.mean
    item.write(model, np.moveaxis(fitted.reshape(-1, taps, len(keep)), 1, 2).reshape(-1, taps * len(keep)))
    bias = item.bias(model)
    if bias is not None:
        old = np.asarray(constant(bias))
        set_constant(bias, (old + shift).astype(old.dtype))


def _operands(site: Site) -> list[tuple[str, int, int]]:
    """The values whose channels a contraction multiplies: (name, axis, rank), one or two of them."""
    value = site.operand
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
    if site.node.op_type in ("ReduceL2", "ReduceSumSquare"):  # multiplies them by themselves
        found *= 2
    return found


def _keys(site: Site) -> list[tuple[str, int]]:
    """What the moments of the operands are filed under: values, with the axis counted from the end."""
    return [(value, axis - rank) for value, axis, rank in _operands(site)]


def _rows(axis: int, limit: int) -> Callable[[np.ndarray], np.ndarray]:
    """Turn a value into at most ``limit`` rows over the channels of ``axis``, counted from the end.

    The two operands of a product may have different ranks, and a vector has but one axis.
    """

    def rows(array: np.ndarray) -> np.ndarray:
        own = max(axis, -array.ndim)
        flat = np.moveaxis(array, own, -1).reshape(-1, array.shape[own])
        return flat[np.linspace(0, len(flat) - 1, limit).astype(int)] if len(flat) > limit else flat

    return rows


def _factor(site: Site, fit: Mapping[tuple[str, int], Moments], held: Mapping[tuple[str, int], Moments]) -> Factor:
    found = [(fit[key], held[key]) for key in _keys(site)]
    n = len(site.labels)
    if any(m.empty for pair in found for m in pair):
        # Nothing is known of what it reads: channels are then told by their weights alone.
        even = np.eye(n)
        weight = np.ones((1, n)) if site.weight < 0 else np.asarray(constant(site.node.inputs[site.weight]))
        return Factor(_matrix(weight, site), even, None, np.zeros(n), None)
    own, other = found[0]
    mean = own.mean()
    if site.weight < 0:
        # Both factors vary: the outputs are sums over n products, whose moments factorize when they are independent.
        moments, judge = (np.prod([m.second() for m in each], axis=0) for each in zip(*found, strict=True))
        return Factor(np.ones((1, n)), _lean(moments), _lean(judge), mean, None)
    weight = np.asarray(constant(site.node.inputs[site.weight]))
    moved = other.mean() - mean
    moments, judge = _lean(own.covariance()), _lean(other.covariance())
    judge += np.outer(moved, moved)
    matrix = _matrix(weight, site)
    if _side_by_side(site):
        group = np.arange(n) // (n // site.groups)
        # Channels of different groups never meet in one output: they cannot take over from each other.
        apart = group[:, None] == group[None]
        return Factor(matrix, moments * apart, judge * apart, mean, None)
    return Factor(matrix, moments, judge, mean, layer(site))


def _lean(moments: np.ndarray) -> np.ndarray:
    return moments.astype(np.float32)


def _side_by_side(site: Site) -> bool:
    """True for a weight (out, n / groups, ...), in which the input channels of all groups lie over each other."""
    return site.groups > 1 and site.node.op_type != "ConvTranspose"


def _matrix(weight: np.ndarray, site: Site) -> np.ndarray:
    """The factors of every channel of a contraction, (out, n)."""
    n = len(site.labels)
    if site.weight < 0:
        return weight
    if _side_by_side(site):
        parts = weight.reshape(site.groups, -1, weight.shape[1], int(np.prod(weight.shape[2:])))
        return np.moveaxis(parts, 2, 1).reshape(n, -1).T
    return np.moveaxis(weight, site.weight_axis, -1).reshape(-1, n)
